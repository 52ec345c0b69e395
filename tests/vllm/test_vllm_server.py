"""VLLMServerEngine with a real vLLM server that was started with other weights, in a tied model."""

from __future__ import annotations

import pytest
import torch

from spear_lightning.engines.vllm.client import VLLMServer
from spear_lightning.engines.vllm.server import VLLMServerEngine
from spear_lightning.engines.vllm.transport import Broadcast, SharedFolder
from tests.vllm.conftest import WINDOW, assert_by, requests


@pytest.fixture
def engine_of(server_of, tied_policy):
    engines = []

    def make(transport=None):
        server = server_of(tied_policy(9))
        engines.append(VLLMServerEngine([server.address], transport=transport, restart_seconds=300.0, seconds=120.0))
        engines[-1].prepare(tied_policy(0), torch.device("cpu"))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("transport", [SharedFolder, Broadcast])
def test_weights_brought_into_a_tied_model_are_those_it_generates_with(engine_of, tied_policy, transport):
    engine = engine_of(transport(seconds=60.0))
    for version, asked in ((1, requests()), (2, requests()), (3, requests(temperature=0.0))):
        policy = tied_policy(version)
        engine.sync(policy, version)
        found = engine.generate(asked)
        assert_by(policy, asked, found)
        assert {c.weight_version for c in found} == {version}


def test_no_keys_and_values_of_older_weights_are_used(engine_of, tied_policy):
    engine, asked = engine_of(), requests(3, prompt=300, length=4)
    for version in (1, 2):
        engine.sync(tied_policy(version), version)
        for _ in range(2):  # the second time from the prefix cache
            assert_by(tied_policy(version), asked, engine.generate(asked))


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_generated(engine_of, tied_policy):
    engine, asked = engine_of(), requests()
    engine.sync(tied_policy(1), 1)
    together = [c.ids.tolist() for c in engine.generate(asked)]
    assert [engine.generate([request])[0].ids.tolist() for request in asked[::-1]] == together[::-1]
    assert len({tuple(ids) for ids in together}) > 1


def test_more_prompts_than_fit_into_one_pass(engine_of, tied_policy):
    asked = requests(40, prompt=300, length=4)
    engine = engine_of()
    engine.sync(tied_policy(1), 1)
    assert_by(tied_policy(1), asked, engine.generate(asked))


def test_a_prompt_without_room_and_one_with_little(engine_of, tied_policy):
    engine = engine_of()
    engine.sync(tied_policy(1), 1)
    asked = requests(4, prompt=WINDOW - 2)
    found = engine.generate(asked)
    assert [(len(c.ids) <= 2, c.finish) for c in found[:2]] == [(True, found[0].finish), (True, found[1].finish)]
    assert_by(tied_policy(1), asked[:2], found[:2])
    assert [(len(c.ids), c.finish) for c in found[2:]] == [(0, "length")] * 2


def test_weights_of_another_version_are_replaced_before_the_server_goes_on(engine_of, server_of, tied_policy):
    engine, asked = engine_of(), requests()
    engine.sync(tied_policy(1), 1)
    stranger = VLLMServerEngine(engine.addresses)
    stranger.sync(tied_policy(2), 1)  # another run takes the server
    found = engine.generate(asked)
    assert_by(tied_policy(1), asked, found)
    assert VLLMServer(engine.addresses[0], 10.0).version().endswith("-1")
    stranger.close()


def test_a_server_killed_and_started_anew_is_caught_up(engine_of, server_of, tied_policy):
    engine, asked, server = engine_of(Broadcast(seconds=60.0)), requests(), server_of(tied_policy(9))
    engine.sync(tied_policy(1), 1)
    wanted = [c.ids.tolist() for c in engine.generate(asked)]
    server.kill()
    server.start()  # with the weights of seed 9
    found = engine.generate(asked)
    assert_by(tied_policy(1), asked, found)
    assert [c.ids.tolist() for c in found] == wanted

"""VLLMEngine: vLLM in this very process, in a tied model."""

from __future__ import annotations

import pytest
import torch

from spear_lightning.engines.vllm.engine import VLLMEngine
from tests.vllm.conftest import WINDOW, assert_by, requests


@pytest.fixture(scope="module")
def engine():
    made = VLLMEngine(max_length=WINDOW, max_batch=64, eager=True)
    yield made
    made.close()


def test_weights_brought_into_a_tied_model_are_those_it_generates_with(engine, tied_policy):
    for version, asked in ((1, requests()), (2, requests()), (3, requests(temperature=0.0))):
        policy = tied_policy(version)
        engine.wake()
        engine.sync(policy, version)
        found = engine.generate(asked)
        assert_by(policy, asked, found)
        assert {c.weight_version for c in found} == {version}
        engine.sleep()


def test_weights_changed_in_place_are_taken_over(engine, tied_policy):
    policy = tied_policy(4)
    engine.sync(policy, 1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)
    engine.sync(policy, 2)
    assert_by(policy, requests(), engine.generate(requests()))


def test_no_keys_and_values_of_older_weights_are_used(engine, tied_policy):
    asked = requests(3, prompt=300, length=4)
    for version in (1, 2):
        engine.sync(tied_policy(version), version)
        for _ in range(2):  # the second time from the prefix cache
            assert_by(tied_policy(version), asked, engine.generate(asked))


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_generated(engine, tied_policy):
    asked = requests()
    engine.sync(tied_policy(1), 1)
    together = [c.ids.tolist() for c in engine.generate(asked)]
    assert [engine.generate([request])[0].ids.tolist() for request in asked[::-1]] == together[::-1]
    assert len({tuple(ids) for ids in together}) > 1


def test_more_prompts_than_fit_into_one_pass(engine, tied_policy):
    asked = requests(40, prompt=300, length=4)
    engine.sync(tied_policy(1), 1)
    assert_by(tied_policy(1), asked, engine.generate(asked))


def test_a_prompt_without_room_ends_as_overlong(engine, tied_policy):
    engine.sync(tied_policy(1), 5)
    found = engine.generate(requests(4, prompt=WINDOW - 2))
    assert [len(c.ids) <= room for c, room in zip(found, (2, 1, 0, 0), strict=True)] == [True] * 4
    assert [(len(c.ids), c.finish, c.weight_version) for c in found[2:]] == [(0, "length", 5)] * 2

"""VLLMServerEngine against real servers that speak vLLM's protocol around a tiny policy of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spear_lightning.engines.base import Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.engines.vllm.requests import StaleWeightsError, completion_of
from spear_lightning.engines.vllm.routing import StickySessions
from spear_lightning.engines.vllm.server import VLLMServerEngine
from spear_lightning.engines.vllm.transport import Broadcast, SharedFolder
from spear_lightning.engines.vllm.weights import PolicyWeights
from spear_lightning.policy.lora import LoRA
from tests.engines.vllm_protocol import ProtocolServer


@pytest.fixture
def serve(tiny_policy: Any) -> Iterator[Callable[..., ProtocolServer]]:
    """Starts servers that hold other weights than the policy that is trained (seed 0)."""
    servers: list[ProtocolServer] = []

    def start(**settings: Any) -> ProtocolServer:
        policy = settings.pop("policy", None) or tiny_policy(seed=9)
        servers.append(ProtocolServer(policy, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def requests(count: int = 4, length: int = 8, temperature: float = 0.8, **sampling: Any) -> list[Request]:
    settings = Sampling(length, temperature, stop_ids=(1, 8), **sampling)
    generator = np.random.default_rng(0)
    return [
        Request(f"s{number}", generator.integers(3, 40, 5 + number).astype(np.int32), settings, seed=number + 1)
        for number in range(count)
    ]


def expected(policy: Any, asked: list[Request]) -> list[Any]:
    engine = HuggingFaceEngine()
    engine.sync(policy, 0)
    return engine.generate(asked)


def assert_same(found: list[Any], wanted: list[Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.finish == other.finish
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def engine_of(*servers: ProtocolServer, **settings: Any) -> VLLMServerEngine:
    settings = {"restart_seconds": 5.0, "seconds": 20.0, **settings}
    return VLLMServerEngine([server.address for server in servers], **settings)


@pytest.mark.parametrize("transport", [SharedFolder, lambda: Broadcast(seconds=20.0)], ids=["folder", "broadcast"])
def test_the_servers_generate_with_the_weights_they_are_brought(serve, tiny_policy, transport):
    one, two = serve(), serve()
    engine = engine_of(one, two, transport=transport())
    engine.prepare(tiny_policy(), torch.device("cpu"))
    for version, seed in ((3, 0), (4, 5)):
        policy = tiny_policy(seed=seed)
        engine.sync(policy, version)
        found = engine.generate(requests())
        assert_same(found, expected(policy, requests()))
        assert {c.weight_version for c in found} == {version}
        assert all(np.isnan(c.entropies).all() and len(c.entropies) == len(c.ids) for c in found)
    assert {len(one.seen), len(two.seen)} == {4}, "both have done half"
    assert engine.generate([]) == []
    engine.close()


def test_weights_are_cast_to_what_the_server_computes_in_and_adapters_are_added(serve, tiny_policy):
    server = serve(policy=tiny_policy(seed=9, dtype="bfloat16"))
    policy = tiny_policy(lora=LoRA(rank=2))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    engine = engine_of(server)
    engine.sync(policy, 1)
    merged = policy.model.merge_and_unload()
    for (name, ours), theirs in zip(merged.named_parameters(), server.policy.causal_lm.parameters(), strict=True):
        assert torch.equal(ours.to(torch.bfloat16), theirs), name
    engine.close()


def test_described_weights_are_those_that_come(tiny_policy):
    for kind in ("qwen2", "llama"):
        weights = PolicyWeights(tiny_policy(kind), "bfloat16")
        come = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in weights]
        assert [(w.name, f"torch.{w.dtype}", w.shape) for w in weights.describe()] == come
        assert len({name for name, _, _ in come}) == len(come)
    assert "lm_head.weight" in dict(weights), "llama's is its own"
    assert "lm_head.weight" not in dict(PolicyWeights(tiny_policy("qwen2"))), "tied: sent once"


def test_only_the_latest_weights_stay_in_the_folder(serve, tiny_policy, tmp_path):
    engine = engine_of(serve(), transport=SharedFolder(str(tmp_path)))
    for version in range(3):
        engine.sync(tiny_policy(seed=version), version)
    (kept,) = (tmp_path / "rank0").iterdir()
    assert kept.name.endswith("-2-float32")
    engine.close()
    assert not (tmp_path / "rank0").exists()


def test_sessions_stay_with_their_server(serve, tiny_policy):
    servers = [serve(), serve()]
    engine = engine_of(*servers)
    engine.sync(tiny_policy(), 0)
    for _ in range(2):
        engine.generate(requests(6))
    for server in servers:
        prompts = [tuple(body["token_ids"]) for body in server.seen]
        assert sorted(prompts) == sorted(2 * list(dict.fromkeys(prompts))), "each prompt twice at the same server"
        assert len(prompts) == 6
    sessions = StickySessions(["a", "b", "c"])
    assert [sessions.place(name) for name in "12345"] == ["a", "b", "c", "a", "b"]
    sessions.end("2")
    sessions.end("5")
    assert sessions.place("6") == "b", "the one that has fewest"
    sessions.lost.add("a")
    assert {sessions.place("1"), sessions.place("4")} == {"b", "c"}
    assert sessions.place("3") == "c"


def test_a_server_restarted_in_the_middle_of_a_phase_is_caught_up_before_it_goes_on(serve, tiny_policy):
    first, policy = serve(), tiny_policy()
    engine = engine_of(first)
    engine.sync(policy, 7)
    wanted = expected(policy, requests())
    assert_same(engine.generate(requests()), wanted)
    port = first.port
    first.kill()
    started: list[ProtocolServer] = []
    timer = threading.Timer(0.2, lambda: started.append(ProtocolServer(tiny_policy(seed=3), port=port)))
    timer.start()  # it comes back with weights of its own while the engine asks
    try:
        found = engine.generate(requests())
    finally:
        timer.join()
    assert_same(found, wanted)
    assert {c.weight_version for c in found} == {7}
    calls = started[0].calls
    assert calls.index("spear_load_folder") < calls.index("/update_weight_version") < calls.index("/resume")
    assert calls.count("spear_load_folder") == 1, "once, not once a request"
    started[0].kill()


def test_a_server_restarted_unnoticed_is_found_out_by_its_version(serve, tiny_policy):
    first, policy = serve(), tiny_policy()
    engine = engine_of(first, transport=Broadcast(seconds=20.0))
    engine.sync(policy, 7)
    port = first.port
    first.kill()
    second = ProtocolServer(tiny_policy(seed=3), port=port)
    assert_same(engine.generate(requests()), expected(policy, requests()))
    assert len(second.seen) > 4, "answers by the old weights were asked for again"
    assert second.calls.count("spear_join") == second.calls.count("spear_receive") == 1
    second.kill()


def test_a_server_that_stays_away_hands_its_sessions_over(serve, tiny_policy):
    one, two, policy = serve(), serve(), tiny_policy()
    engine = engine_of(one, two, restart_seconds=0.1)
    engine.sync(policy, 1)
    engine.generate(requests())
    two_port = two.port
    two.kill()
    with pytest.warns(RuntimeWarning, match=f"the vLLM server {two.address} is away for more than 0.1 s"):
        assert_same(engine.generate(requests()), expected(policy, requests()))
    again = ProtocolServer(tiny_policy(seed=3), port=two_port)
    engine.sync(policy, 2)  # it is back: asked again from the next phase on
    for request in requests():
        engine.end(request.session)
    assert_same(engine.generate(requests()), expected(policy, requests()))
    assert again.seen, "it takes its part"
    again.kill()
    one.kill()
    with pytest.warns(RuntimeWarning, match="is away"), pytest.raises(RuntimeError, match="none of the vLLM servers"):
        engine.generate(requests())


def test_answers_by_old_weights_are_refused_for_good_if_they_do_not_end(serve, tiny_policy):
    server = serve()
    engine = engine_of(server, retries=2)
    engine.sync(tiny_policy(), 5)
    stale = {"token_ids": [4], "finish_reason": "length", "logprobs": {"content": [{"token_id": 4, "logprob": -1}]}}
    server.hook = lambda body: (200, {"choices": [{**stale, "weight_versions": [{"version": "4", "start": 0}]}]})
    with pytest.raises(RuntimeError, match=r"s0 has no completion after 3 attempts: .* by weights 4 instead of \w+-5"):
        engine.generate(requests(1))
    with pytest.raises(StaleWeightsError, match="by weights 4, 5 instead of 5"):
        completion_of(requests(1)[0], [3, 4], [0.0, 0.0], ["4", "5"], "5", 5)
    server.hook = lambda body: (200, {"choices": [stale]})
    with pytest.raises(RuntimeError, match=r"needs vLLM 0.32 or newer"):
        engine.generate(requests(1))


def test_what_may_pass_is_tried_again(serve, tiny_policy):
    server, policy = serve(), tiny_policy()
    engine = engine_of(server)
    engine.sync(policy, 5)
    aborted = (200, {"choices": [{"token_ids": [], "finish_reason": "abort", "logprobs": None}]})
    answers = iter([(503, "busy"), aborted, (200, {"choices": []}), (500, "died")])
    server.hook = lambda body: next(answers, None)
    assert_same(engine.generate(requests(1)), expected(policy, requests(1)))
    assert len(server.seen) == 5
    server.hook = lambda body: (400, "no such thing")
    with pytest.raises(RuntimeError, match=r"answered /inference/v1/generate with status 400.*no such thing"):
        engine.generate(requests(1))
    assert len(server.seen) == 6, "a refusal is not asked again"


def test_a_prompt_without_room_ends_as_overlong_and_no_server_is_asked(serve, tiny_policy):
    server = serve(window=8)
    engine = engine_of(server)
    engine.sync(tiny_policy(), 2)
    found = engine.generate(requests(5))  # prompts of 5 to 9 tokens
    assert [len(c.ids) <= room for c, room in zip(found, (3, 2, 1, 0, 0), strict=True)] == [True] * 5
    assert [(len(c.ids), c.finish, c.weight_version) for c in found[3:]] == [(0, "length", 2)] * 2
    assert len(server.seen) == 3


def test_truncated_sampling_has_no_log_probabilities(serve, tiny_policy):
    server, policy = serve(), tiny_policy()
    engine = engine_of(server)
    engine.sync(policy, 0)
    found = engine.generate(requests(top_p=0.5))
    assert all(np.isnan(c.logps).all() for c in found), "vLLM tells those of the truncated distribution"
    assert [c.ids.tolist() for c in found] == [c.ids.tolist() for c in expected(policy, requests(top_p=0.5))]


def test_servers_that_cannot_be_used_are_told_apart(serve, tiny_policy, tiny_tokenizer):
    policy, server = tiny_policy(), serve()
    gone = engine_of(server, restart_seconds=0.0)
    server.missing = {"/health"}
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:\d+ \(data.engine.addresses\) cannot be reached"):
        gone.prepare(policy, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="none of the vLLM servers"), pytest.warns(RuntimeWarning, match="is away"):
        gone.sync(policy, 0)
    server.missing = {"/collective_rpc"}
    with pytest.raises(ValueError, match=r"has no /collective_rpc.*without VLLM_SERVER_DEV_MODE"):
        engine_of(server).prepare(policy, torch.device("cpu"))
    server.missing = {"/inference/v1/generate"}
    older = engine_of(server)
    older.sync(policy, 0)
    with pytest.raises(RuntimeError, match="has no /inference/v1/generate: it is older than"):
        older.generate(requests(1))
    server.missing, server.worker = set(), object()  # started without the extension
    with pytest.raises(ValueError, match=r"cannot receive weights(.|\n)*--worker-extension-cls"):
        engine_of(server).prepare(policy, torch.device("cpu"))
    other = serve(policy=tiny_policy(config={"hidden_size": 64}))
    with pytest.raises(RuntimeError, match=r"another model than model.policy: hidden_size is 64 there and 32 here"):
        engine_of(other).sync(policy, 0)
    with pytest.raises(ValueError, match=r"another model than model.policy"):
        engine_of(other).prepare(policy, torch.device("cpu"))
    words = serve()
    words.tokenizer = type("Tokenizer", (), {"encode": lambda self, text, **_: [1, 2, 3]})()
    with pytest.raises(RuntimeError, match=r"another tokenizer than model.policy"):
        engine_of(words).sync(policy, 0)
    words.missing = {"/tokenize"}
    engine_of(words).sync(policy, 0)  # a server that needs no tokenizer


def test_a_folder_that_the_server_does_not_see(serve, tiny_policy, tmp_path, monkeypatch):
    server = serve()
    transport = SharedFolder(str(tmp_path / "weights"))
    write = transport._write
    monkeypatch.setattr(transport, "_write", lambda *a: write(*a).with_name("elsewhere"))
    engine = engine_of(server, transport=transport)
    with pytest.raises(RuntimeError, match="holds no safetensors files here: trainer and server must see the same"):
        engine.sync(tiny_policy(), 0)
    assert not server.paused, "it is left as it was found"
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"engine.transport.folder: .* cannot be written to"):
        engine_of(server, transport=SharedFolder(str(tmp_path / "file"))).sync(tiny_policy(), 0)


def test_servers_that_share_their_gpu_sleep_between_phases(serve, tiny_policy):
    server = serve()
    engine = engine_of(server, free_memory=True)
    engine.wake()
    engine.sync(tiny_policy(), 0)
    engine.sleep()
    calls = [call for call in server.calls if call.startswith(("/sleep", "/wake", "spear_load", "/reset"))]
    assert calls == ["/wake_upweights", "spear_load_folder", "/wake_upkv_cache", "/reset_prefix_cache", "/sleep2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"addresses": []}, "at least one"),
        ({"addresses": ["localhost:8000"]}, "begin with http"),
        ({"addresses": ["http://a", "http://a/v1/"]}, "twice"),
        ({"addresses": ["http://a"], "parallel": 0}, r"VLLMServerEngine\.parallel must be at least 1, not 0"),
        ({"addresses": ["http://a"], "retries": -1}, r"VLLMServerEngine\.retries must be at least 0, not -1"),
        ({"addresses": ["http://a"], "seconds": 0.0}, r"VLLMServerEngine\.seconds must be above 0, not 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VLLMServerEngine(**settings)


def test_bad_requests(serve, tiny_policy):
    engine = engine_of(serve())
    with pytest.raises(RuntimeError, match="before sync"):
        engine.generate(requests(1))
    engine.sync(tiny_policy(), 0)
    with pytest.raises(ValueError, match="same session"):
        engine.generate([*requests(1), *requests(1)])
    with pytest.raises(ValueError, match=r"temperature 0.001"):
        engine.generate(requests(1, temperature=0.001))

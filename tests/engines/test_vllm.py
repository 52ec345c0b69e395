"""VLLMEngine as far as it goes without vLLM; the rest is in tests/vllm."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spear_lightning.engines.base import Request, Sampling
from spear_lightning.engines.vllm.engine import VLLMEngine


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_is_told_so_before_anything_is_started(tiny_policy):
    policy = tiny_policy()
    for begin in (lambda: VLLMEngine().prepare(policy, torch.device("cpu")), lambda: VLLMEngine().sync(policy, 0)):
        with pytest.raises(ValueError, match=r"vLLM is not installed here: pip install 'spear-lightning\[vllm\]'"):
            begin()
    VLLMEngine().sleep()
    VLLMEngine().close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "VLLMEngine.max_length must be at least 2, not 1"),
        ({"memory": 1.0}, "VLLMEngine.memory must be above 0 and below 1, not 1.0"),
        ({"max_batch": 0}, "VLLMEngine.max_batch must be at least 1, not 0"),
        ({"options": {"dtype": "half", "seed": 1}}, "engine.options must not hold dtype"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(**settings)


def test_generating_before_sync_is_refused():
    with pytest.raises(RuntimeError, match="before sync"):
        VLLMEngine().generate([])


def test_requests_and_responses_are_converted(tiny_policy, monkeypatch):
    asked = []

    def generate(prompts, samplings, use_tqdm):
        asked.extend(zip(prompts, samplings, strict=True))
        entries = [{7: SimpleNamespace(logprob=-0.5)}, {8: SimpleNamespace(logprob=-1.5)}]
        spans = [SimpleNamespace(version="3")]
        output = SimpleNamespace(token_ids=[7, 8], logprobs=entries, weight_versions=spans)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **fields: fields))
    config = SimpleNamespace(max_model_len=10)
    vllm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config), generate=generate)
    engine = VLLMEngine()
    engine._policy, engine._version, engine._vllm = tiny_policy(), 3, vllm
    sampling = Sampling(6, temperature=0.5, stop_ids=(8,))
    sizes = (4, 10, 7)  # the second leaves no room, the third room for three tokens
    found = engine.generate([Request(str(n), np.full(n, 5, np.int32), sampling, seed=n) for n in sizes])
    assert [fields["max_tokens"] for _, fields in asked] == [6, 3]
    assert [len(prompt["prompt_token_ids"]) for prompt, _ in asked] == [4, 7]
    assert [(fields["seed"], fields["temperature"], fields["stop_token_ids"]) for _, fields in asked] == [
        (4, 0.5, [8]),
        (7, 0.5, [8]),
    ]
    assert [c.ids.tolist() for c in found] == [[7, 8], [], [7, 8]]
    assert [c.logps.tolist() for c in found] == [[-0.5, -1.5], [], [-0.5, -1.5]]
    assert [(c.finish, c.weight_version) for c in found] == [("stop", 3), ("length", 3), ("stop", 3)]

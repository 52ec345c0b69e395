"""VLLMEngine as far as it goes without vLLM; the rest is in tests/vllm."""

from __future__ import annotations

import importlib.util

import pytest
import torch

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

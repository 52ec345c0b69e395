"""The forward pass that is written out against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spear_lightning.engines.huggingface.forward import CachedForward, generation_mode
from spear_lightning.engines.huggingface.kv_cache import KeyValueRows
from spear_lightning.engines.huggingface.llama import LlamaForward
from spear_lightning.policy.policy import LoRA, Policy

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}

WRITTEN_OUT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, fewer key heads": ("llama", {"num_key_value_heads": 1}, {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "mistral": ("llama", {"model_type": "mistral", "sliding_window": 7}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, adapters": ("qwen2", {}, {"lora": LoRA(rank=4)}),
    "qwen2, packed layout": ("qwen2", {}, {"layout": "packed"}),
    "qwen2, bfloat16": ("qwen2", {}, {"dtype": "bfloat16"}),
    "qwen2, long context": ("qwen2", {"rope_parameters": YARN}, {}),
    "qwen3": ("qwen2", {"model_type": "qwen3", "head_dim": 16}, {}),
}

LEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, {}),
    "eager attention": ("qwen2", {}, {"attention": "eager"}),
    "another architecture": ("llama", {"model_type": "gemma", "head_dim": 8}, {}),
}


def disturbed(policy: Policy) -> Policy:
    """With norms, biases and adapters that are not those of a fresh model, which change nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return policy


def logits_of(forward: CachedForward) -> list[torch.Tensor]:
    """A prompt, more of it, and single tokens, in rows of different length."""
    cache = KeyValueRows()
    cache.reserve(3, 40)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 0, 0])
    found = []
    for news in ([9, 4, 6], [1, 3, 5], [1, 1, 1], [1, 1, 1]):
        new = torch.tensor(news)
        ids = torch.randint(5, 40, (3, int(new.max())), generator=generator)
        columns = lengths[:, None] + torch.arange(ids.shape[1])
        width = int(columns.max()) + 1
        with generation_mode(forward.policy):
            found.append(forward.feed(cache, ids, new - 1, slice(0, 3), columns, columns, width))
        lengths = lengths + new
    return found


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_the_logits_are_those_of_the_model(tiny_policy, kind: str) -> None:
    name, config, settings = WRITTEN_OUT[kind]
    policy = disturbed(tiny_policy(name, config, **settings))
    assert LlamaForward.fits(policy)
    written, own = CachedForward(policy), CachedForward(policy)
    own._llama = None
    tolerance = 0.1 if settings.get("dtype") == "bfloat16" else 2e-5
    for one, other in zip(logits_of(written), logits_of(own), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("kind", LEFT)
def test_other_models_compute_themselves(tiny_policy, kind: str) -> None:
    name, config, settings = LEFT[kind]
    assert not LlamaForward.fits(tiny_policy(name, config, **settings))


def test_a_model_with_hooks_computes_itself(tiny_policy) -> None:
    policy = tiny_policy()
    policy.causal_lm.base_model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not LlamaForward.fits(policy)

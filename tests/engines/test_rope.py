"""Rotary embeddings looked up against those that models compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from spear_lightning.engines.huggingface.ops import RopeTable, rotate

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def module(kind: str) -> LlamaRotaryEmbedding:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **KINDS[kind]}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=128, rope_parameters=rope)
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_rotated_as_the_model_does(kind: str) -> None:
    rope, own = RopeTable(module(kind)), module(kind)
    generator = torch.Generator().manual_seed(0)
    # Within the table, beyond it, beyond the length the model was made for, and back.
    for start in (0, 100, 300, 900, 5):
        positions = torch.arange(start, start + 7) + torch.tensor([[0], [3]])
        heads = torch.randn(2, 7, 4, 8, generator=generator)
        angles = rope(heads, positions, start + 10)
        expected, _ = apply_rotary_pos_emb(heads, heads, *own(heads, positions), unsqueeze_dim=2)
        torch.testing.assert_close(rotate(heads, *angles), expected, rtol=0, atol=1e-5)


def test_angles_have_the_precision_of_what_is_rotated() -> None:
    rope, positions = RopeTable(module("default")), torch.tensor([[3]])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        cos, sin = rope(torch.zeros(1, dtype=dtype), positions, 4)
        assert cos.dtype == sin.dtype == dtype


def test_what_is_known_is_looked_up() -> None:
    calls = []

    class Counted(LlamaRotaryEmbedding):
        def forward(self, *arguments: Any) -> Any:
            calls.append(arguments)
            return super().forward(*arguments)

    rope = RopeTable(Counted(module("default").config))
    for width in (1, 200, 256, 257, 500):
        rope(torch.zeros(1), torch.tensor([[width - 1]]), width)
    assert len(calls) == 2

"""The operations of generation against the usual forms, in every shape that is treated differently."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from spear_lightning.engines.huggingface import ops as operations
from spear_lightning.engines.huggingface.ops import Attention, linear, needed_widths, rms_norm


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 64, 128, 129])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_linear(rows: int, bias: bool, large: bool, monkeypatch) -> None:
    if large:
        monkeypatch.setattr(operations, "LARGE_WEIGHT", 1)
    hidden, weight, added = numbers(rows, 24), numbers(40, 24, seed=1), numbers(40, seed=2) if bias else None
    torch.testing.assert_close(linear(hidden, weight, added), F.linear(hidden, weight, added), rtol=0, atol=1e-5)


def test_few_rows_are_multiplied_from_the_other_side() -> None:
    assert linear(numbers(32, 8), numbers(4, 8)).stride() == (1, 32)
    assert linear(numbers(8, 8), numbers(4, 8)).stride() == (4, 1)
    assert linear(numbers(32, 8).bfloat16(), numbers(4, 8).bfloat16()).stride() == (4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    hidden, weight = numbers(5, 3, 16).to(dtype), numbers(16, seed=1).to(dtype)
    hidden[0] = 0  # epsilon keeps it from dividing by nothing
    found = rms_norm(hidden, weight, torch.tensor(1e-2))
    torch.testing.assert_close(found, F.rms_norm(hidden, (16,), weight, 1e-2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 128, 300])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_to_a_cache(tokens: int, groups: int) -> None:
    rows, heads, size, columns = 3, 2, 8, 420
    query = numbers(rows, tokens, heads * groups, size)
    cache = numbers(2, rows, heads, columns + 50, size, seed=1)
    cache[:, :, :, columns:] = torch.nan  # what stands beyond is never looked at
    keys, values = cache[:, :, :, :columns]
    positions = torch.tensor([[columns - tokens], [20], [0]]) + torch.arange(tokens)
    seen = torch.arange(columns) <= positions[:, None, :, None]
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    found = Attention(mask, positions, heads, scale=0.5)(query, keys, values)
    repeated = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    expected = F.scaled_dot_product_attention(query.transpose(1, 2), *repeated, attn_mask=seen, scale=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2).reshape(rows * tokens, -1), rtol=0, atol=1e-5)


def test_blocks_of_tokens_look_at_what_they_can_see() -> None:
    positions = torch.stack([torch.arange(300), torch.arange(300) + 20])
    assert needed_widths(positions, 320) == [276, 320]
    assert needed_widths(positions, 250) == [250, 250]
    assert needed_widths(positions[:, :128], 148) == [148]

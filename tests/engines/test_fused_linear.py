"""Fused linear layers against the layers one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spear_lightning.engines.huggingface import ops as fused_linear
from spear_lightning.engines.huggingface.ops import FusedLinear


class Adapted(nn.Linear):
    """Something that stands in place of a plain layer."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 1


def layers(*biases: bool, kind: type[nn.Linear] = nn.Linear) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [kind(8, size, bias=bias) for size, bias in zip((12, 4, 6), biases, strict=True)]


CASES = {
    "plain": layers(False, False, False),
    "biases": layers(True, True, True),
    "some biases": layers(True, False, True),
    "adapters": [*layers(True, True, True)[:2], *layers(True, True, True, kind=Adapted)[2:]],
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("rows", [1, 32, 200])
@pytest.mark.parametrize("large", [False, True])
@torch.inference_mode()
def test_outputs_are_those_of_the_layers(kind: str, rows: int, large: bool, monkeypatch) -> None:
    if large:
        monkeypatch.setattr(fused_linear, "LARGE_WEIGHT", 1)
    modules, hidden = CASES[kind], torch.randn(rows, 8)
    fused, expected = FusedLinear(*modules), [module(hidden) for module in modules]
    for one, other in zip(fused.apart(hidden), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.together(hidden), torch.cat(expected, -1), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_large_weights_are_not_copied(monkeypatch) -> None:
    modules, hidden = layers(True, True, True), torch.randn(3, 8)
    small = FusedLinear(*modules)
    monkeypatch.setattr(fused_linear, "LARGE_WEIGHT", 1)
    large = FusedLinear(*modules)
    before = large.together(hidden)
    with torch.no_grad():
        for module in modules:
            module.weight.add_(1)
    after = torch.cat([module(hidden) for module in modules], -1)
    torch.testing.assert_close(large.together(hidden), after, rtol=0, atol=1e-5)
    torch.testing.assert_close(small.together(hidden), before, rtol=0, atol=1e-5)
    monkeypatch.undo()
    small.refresh()
    torch.testing.assert_close(small.together(hidden), after, rtol=0, atol=1e-5)

"""Linear layers of one input as one product, where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spear_lightning.engines.huggingface.ops import LARGE_WEIGHT, linear


def linear_of(module: Any) -> Callable[[Tensor], Tensor]:
    """A plain layer without the way through its module; what stands in place of one (adapters) as it is.

    Args:
        module: whose parameters are referred to: they may change, but not be replaced.
    """
    if type(module) is not nn.Linear:
        return module  # type: ignore[no-any-return]
    weight, bias = module.weight, module.bias
    return lambda hidden: linear(hidden, weight, bias)


class FusedLinear:
    """The outputs of linear layers for the same input: of queries, keys and values, or of gate and up.

    A small product takes hardly longer than calling it. On a CPU, small layers in float32 are computed as one, with a
    copy of their weights; others, and what stands in place of a plain layer (adapters), one by one, without a copy.

    Args:
        modules: the layers. Their parameters are referred to: they may change, but not be replaced.
    """

    def __init__(self, *modules: Any) -> None:
        self._modules = modules
        self._layers = [linear_of(module) for module in modules]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._sizes: list[int] = []
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now."""
        self._weight = self._bias = None
        if any(type(module) is not nn.Linear for module in self._modules):
            return
        weights = [module.weight for module in self._modules]
        small = sum(weight.numel() for weight in weights) < LARGE_WEIGHT
        if not small or any(not weight.is_cpu or weight.dtype != torch.float32 for weight in weights):
            return
        self._sizes = [len(weight) for weight in weights]
        self._weight = torch.cat(weights)
        if any(module.bias is not None for module in self._modules):
            biases = zip(self._modules, weights, strict=True)
            self._bias = torch.cat([w.new_zeros(len(w)) if m.bias is None else m.bias for m, w in biases])

    def together(self, hidden: Tensor) -> Tensor:
        """The outputs side by side, ``(rows, outputs of all layers)``.

        Args:
            hidden: ``(rows, inputs)``.
        """
        if self._weight is not None:
            return linear(hidden, self._weight, self._bias)
        return torch.cat([layer(hidden) for layer in self._layers], -1)

    def apart(self, hidden: Tensor) -> Sequence[Tensor]:
        """The output of each layer, ``(rows, its outputs)``.

        Args:
            hidden: ``(rows, inputs)``.
        """
        if self._weight is not None:
            return linear(hidden, self._weight, self._bias).split_with_sizes(self._sizes, -1)
        return [layer(hidden) for layer in self._layers]

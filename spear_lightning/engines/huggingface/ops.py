"""Operations of generation, each in the form that is fastest for the shapes at hand.

They round differently from the usual forms and are equal to them otherwise. How much each gains is measured by
``benchmarks/operations.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor, nn

# Matrix libraries for CPUs deal the weight's outputs to their threads only if there are many rows. For a few of them
# the product of weight and rows, in this order, is up to twice as fast; for very few that holds for large weights only,
# which no cache holds.
_FEW_ROWS = range(16, 129)
_VERY_FEW_ROWS = range(2, 16)
LARGE_WEIGHT = 2**20
_QUERIES = 256  # attended to at once: more see too many keys that are masked


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``hidden · weightᵀ + bias``.

    Args:
        hidden: ``(rows, inputs)``.
        weight: ``(outputs, inputs)``.
        bias: ``(outputs,)``.

    Returns:
        ``(rows, outputs)``; of a few rows on a CPU it is a transposed view.
    """
    rows = hidden.shape[0]
    few = rows in _FEW_ROWS or (rows in _VERY_FEW_ROWS and weight.numel() >= LARGE_WEIGHT)
    if not few or not hidden.is_cpu or hidden.dtype != torch.float32:
        return F.linear(hidden, weight, bias)
    columns = hidden.t()
    return (torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)).t()


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
    """``hidden`` over its root mean square, times ``weight``.

    Args:
        hidden: ``(…, width)``.
        weight: ``(width,)``.
        epsilon: added to the mean square, float32 of no dimension, on the CPU.
    """
    width = hidden.shape[-1]
    if not hidden.is_cpu or hidden.dtype != torch.float32:
        return F.rms_norm(hidden, (width,), weight, float(epsilon))
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    root = torch.addcmul(epsilon, norm, norm, value=1 / width).sqrt_()
    return torch.div(hidden, root).mul_(weight)


class Attention:
    """How the new tokens of a forward pass attend to a cache; made once, called for every layer.

    Args:
        mask: added to the scores, ``(rows, 1, tokens, columns)``.
        positions: of the tokens, ``(rows, tokens)``.
        heads: of keys and values.
        scale: of the scores.
    """

    def __init__(self, mask: Tensor, positions: Tensor, heads: int, scale: float) -> None:
        rows, _, tokens, columns = mask.shape
        self._products = tokens == 1 and mask.is_cpu
        if self._products:
            mask = mask.expand(rows, heads, 1, columns).reshape(rows * heads, 1, columns)
        self._mask, self._scale, self._widths = mask, scale, needed_widths(positions, columns)

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the new tokens.

        Args:
            query: ``(rows, tokens, heads, size)``.
            keys: ``(rows, key-value heads, columns, size)``.
            values: of the same shape.

        Returns:
            The heads side by side, ``(rows · tokens, heads · size)``.
        """
        rows, tokens, heads, size = query.shape
        groups = heads // keys.shape[1]
        if tokens > 1:
            return self._many(query.transpose(1, 2), keys, values, groups).transpose(1, 2).reshape(rows * tokens, -1)
        # The heads of a group see the same keys: as tokens, they read them once.
        if not self._products:
            together = query.reshape(rows, heads // groups, groups, size)
            found = F.scaled_dot_product_attention(together, keys, values, attn_mask=self._mask, scale=self._scale)
        else:  # two plain products: the kernel is made for many queries
            together = query.reshape(-1, groups, size)
            scores = torch.baddbmm(self._mask, together, keys.flatten(0, 1).transpose(1, 2), alpha=self._scale)
            found = torch.bmm(torch.softmax(scores, -1), values.flatten(0, 1))
        return found.reshape(rows, -1)

    def _many(self, query: Tensor, keys: Tensor, values: Tensor, groups: int) -> Tensor:
        """The tokens in blocks, each of which looks at the columns that it can see."""
        if groups > 1 and not query.is_cpu:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            groups = 1
        blocks = []
        for number, width in enumerate(self._widths):
            part = slice(number * _QUERIES, (number + 1) * _QUERIES) if len(self._widths) > 1 else slice(None)
            blocks.append(
                F.scaled_dot_product_attention(
                    query[:, :, part],
                    keys[:, :, :width],
                    values[:, :, :width],
                    attn_mask=self._mask[:, :, part, :width],
                    scale=self._scale,
                    enable_gqa=groups > 1,
                )
            )
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def needed_widths(positions: Tensor, columns: int) -> list[int]:
    """How many of the cache's columns each block of new tokens can see.

    Args:
        positions: of the tokens, ``(rows, tokens)``.
        columns: of the cache that are looked at.

    Returns:
        One number for each block of tokens; on a GPU, where asking would cost more than it saves, a single block.
    """
    if not positions.is_cpu or positions.shape[1] <= _QUERIES:
        return [columns]
    return [min(columns, int(block.max()) + 1) for block in torch.split(positions, _QUERIES, 1)]


_LEAST = 256  # positions of a table


class RopeTable:
    """Rotary position embeddings (RoPE), looked up where the model's own module computes them each time.

    Args:
        module: of a Hugging Face model, which gives cosine and sine, ``(1, tokens, size)``, of positions.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        kind = str(getattr(module, "rope_type", "default"))
        # With these kinds the angles at a position depend on the length of the sequence.
        self._fixed = "dynamic" not in kind and kind != "longrope"
        self._cos = self._sin = torch.zeros(0)

    def __call__(self, hidden: Tensor, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine for :func:`rotate`, both ``(rows, tokens, 1, size)``.

        Args:
            hidden: of the precision and on the device wanted.
            positions: of the tokens, ``(rows, tokens)``.
            width: no position reaches it.
        """
        if not self._fixed:
            cos, sin = self._angles(hidden, positions)
        else:
            if width > len(self._cos) or self._cos.dtype != hidden.dtype or self._cos.device != hidden.device:
                count = max(_LEAST, 1 << (width - 1).bit_length())
                self._cos, self._sin = (part[0] for part in self._angles(hidden, torch.arange(count)[None]))
            cos, sin = self._cos[positions], self._sin[positions]
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def _angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._module(hidden, positions.to(hidden.device))
        one, other = sin.chunk(2, -1)
        return cos, torch.cat([-one, other], -1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of heads into each other.

    Args:
        heads: ``(rows, tokens, heads, size)``.
        cos: ``(rows, tokens, 1, size)``.
        sin: likewise; of the first half with the other sign.
    """
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def linear_of(module: Any) -> Callable[[Tensor], Tensor]:
    """A plain layer without the overhead of its module; its replacements (adapters) as they are.

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
    copy of their weights; others, and replacements of plain layers (adapters), one by one, without a copy.

    Args:
        modules: the layers. Their parameters are referred to: they may change, but not be replaced.
    """

    def __init__(self, *modules: Any) -> None:
        self._modules = modules
        self._layers = [linear_of(module) for module in modules]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now."""
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        modules = self._modules
        plain = all(type(m) is nn.Linear and m.weight.is_cpu and m.weight.dtype == torch.float32 for m in modules)
        if plain and sum(m.weight.numel() for m in modules) < LARGE_WEIGHT:
            self._sizes = [len(m.weight) for m in modules]
            self._weight = torch.cat([m.weight for m in modules])
            if any(m.bias is not None for m in modules):
                self._bias = torch.cat(
                    [m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in modules]
                )

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

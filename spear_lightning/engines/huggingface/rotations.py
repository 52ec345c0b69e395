"""Rotary position embeddings for tokens whose positions are known to lie below a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LEAST = 256  # positions of a table


class Rotations:
    """By how much the heads at a position are rotated: looked up, where the model's own module computes it each time.

    Args:
        module: of a Hugging Face model, which gives cosine and sine, ``(1, tokens, size)``, of positions.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        kind = str(getattr(module, "rope_type", "default"))
        # With these the angles at a position depend on how long the sequence is.
        self._fixed = "dynamic" not in kind and kind != "longrope"
        self._cos = self._sin = torch.zeros(0)

    def __call__(self, hidden: Tensor, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """What :func:`rotate` needs, both ``(rows, tokens, 1, size)``.

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

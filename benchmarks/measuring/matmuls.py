"""The matrix products of a piece of work, and what they alone would cost."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Operand = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


class MatmulRecorder(TorchDispatchMode):
    """Counts matrix products inside by the shapes and strides of their two operands.

    Those inside fused attention are not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[_Operand, _Operand]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = {"mm": args[:2], "bmm": args[:2], "addmm": args[1:3], "addmm_": args[1:3], "baddbmm": args[1:3]}
        pair = operands.get(func.__name__.split(".")[0])
        if pair is not None:
            self.products[_described(pair[0]), _described(pair[1])] += 1
        return func(*args, **(kwargs or {}))

    @property
    def operations(self) -> int:
        """Multiplications and additions of all products."""
        return sum(
            2 * count * torch.Size(one[0]).numel() * other[0][-1] for (one, other), count in self.products.items()
        )

    def plain_seconds(self, repeats: int = 3) -> float:
        """Seconds that ``torch.matmul`` takes for all of them, one after the other, best of ``repeats`` for each."""
        total = 0.0
        for (one, other), count in self.products.items():
            left, right = _made(one), _made(other)
            torch.matmul(left, right)
            best = float("inf")
            for _ in range(repeats):
                started = time.perf_counter()
                torch.matmul(left, right)
                best = min(best, time.perf_counter() - started)
            total += best * count
        return total


def _described(tensor: Tensor) -> _Operand:
    return tuple(tensor.shape), tuple(tensor.stride())


def _made(operand: _Operand) -> Tensor:
    shape, strides = operand
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return torch.randn(size).as_strided(shape, strides)

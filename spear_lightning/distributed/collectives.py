"""The few collective operations of a SPEAR iteration; on one process each is the identity.

They run a handful of times per iteration on small data (rewards, keys, counts): what is large — tokens — stays on the
rank that played it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(value: T) -> list[T]:
    """The values of all ranks, in order of rank. Every rank must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def concatenate(values: Iterable[T]) -> list[T]:
    """The lists of all ranks, joined in order of rank. Every rank must call it."""
    return [item for part in gather(list(values)) for item in part]


def total_over_ranks(count: Tensor) -> Tensor:
    """The sum of a scalar over ranks. Every rank must call it."""
    return count if world_size() == 1 else torch.stack(gather(count.cpu())).sum(0)


def total(counts: Mapping[str, float]) -> dict[str, float]:
    """Sums over ranks, name by name. Every rank must call it; names may differ between ranks."""
    parts = gather(dict(counts))
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

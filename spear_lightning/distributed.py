"""The few collective operations of a SPEAR iteration; on one process each is the identity.

They run a handful of times per iteration on small data (rewards, keys, counts): what is large — tokens — stays on the
rank that played it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# What gloo, NCCL and the store of a process group write, in lower case.
_GONE = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process exited")
_LATE = (
    "timed out waiting",
    "timed out after",
    "timed out connecting",
    "wait timeout",
    "operation timeout",
    "caused pair closure",
)


class LostRankError(RuntimeError):
    """This rank cannot go on because another one does not answer; the message says what to look at."""


def lost_rank(error: RuntimeError) -> LostRankError | None:
    """What an error in a collective operation means for whoever reads it.

    Args:
        error: as torch raised it.

    Returns:
        An error to raise in its place, ``from`` it; ``None`` if it was raised for another reason.
    """
    text = str(error).lower()
    if world_size() == 1 and "gloo" not in text and not isinstance(error, dist.DistError):  # or while ranks still meet
        return None
    where = f"rank {rank() if dist.is_initialized() else os.environ.get('RANK', '?')}"
    if any(word in text for word in _GONE):
        return LostRankError(
            f"{where} has lost the connection to another rank, whose process has ended: the log of that rank says why. "
            "Start the run again with --ckpt_path last"
        )
    if any(word in text for word in _LATE):
        return LostRankError(
            f"{where} has waited for another rank until the time-out (trainer.strategy.init_args.timeout). Either the "
            "network between the nodes is down or on another interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or a "
            "rank hangs, or one iteration of a rank takes so long that the time-out must be raised. Start the run "
            "again with --ckpt_path last"
        )
    return None


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
    sums: dict[str, float] = {}
    for part in gather(dict(counts)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums

"""Propagate an error of one rank to all ranks, or defer it until they can fail together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from spear_lightning.distributed.collectives import gather, rank, world_size

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
    """Explain an error of a collective operation that another rank has caused.

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


def first_failure(step: Callable[[], object]) -> str | None:
    """Run a step that may fail on some ranks only, and tell all ranks. Every rank must call it.

    Args:
        step: must not contain a collective operation that a rank which has failed would not join.

    Returns:
        The first failure, with the number of its rank, the same on all ranks; ``None`` if there is none.
    """
    failure = None
    try:
        step()
    except (OSError, RuntimeError, ValueError) as error:  # torch reports a failed write as RuntimeError
        failure = f"rank {rank()}: {error}"
    return next((found for found in gather(failure) if found is not None), None)


@contextmanager
def errors_deferred(owner: Any, method: str) -> Iterator[None]:
    """Defer errors of a method to the end of the block.

    After the method there are collective operations: a rank that raised before them would leave the others waiting.

    Args:
        owner: object of the method.
        method: its name.
    """
    original, failures = getattr(owner, method), []

    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            failures.append(error)
            return None

    setattr(owner, method, attempt)
    try:
        yield
    finally:
        delattr(owner, method)  # the method of its class shows again
    if failures:
        raise failures[0]

"""Broadcast of weights in buckets, which sender and receiver derive alike from names, types and shapes.

This module and :mod:`spear_lightning.engines.vllm.worker` also run in vLLM's process: they import PyTorch only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 256 << 20
"""Bytes of a bucket; a larger tensor is a bucket of its own."""


class Weight(NamedTuple):
    """Description of a weight; JSON carries it as a list.

    Attributes:
        name: in the Hugging Face checkpoint.
        dtype: name of a PyTorch type (``"bfloat16"``).
        shape: of the whole tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        kind: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * kind.itemsize


def buckets_of(weights: Sequence[Weight], most_bytes: int = BUCKET_BYTES) -> list[list[Weight]]:
    """Cut a list of weights into runs of one type that hold at most ``most_bytes`` together.

    >>> small = [Weight(name, "float32", (2,)) for name in "abc"]
    >>> [[weight.name for weight in bucket] for bucket in buckets_of(small, most_bytes=16)]
    [['a', 'b'], ['c']]
    """
    buckets: list[list[Weight]] = []
    held = 0
    for weight in weights:
        if not buckets or held + weight.bytes > most_bytes or buckets[-1][-1].dtype != weight.dtype:
            buckets.append([])
            held = 0
        buckets[-1].append(weight)
        held += weight.bytes
    return buckets


def send(group: Any, weights: Sequence[Weight], tensors: Iterable[Tensor], device: torch.device) -> None:
    """Broadcast tensors, bucket by bucket, from rank 0 of ``group``.

    Args:
        group: a :class:`torch.distributed.ProcessGroup` from :func:`join`.
        weights: the same as for :func:`receive`.
        tensors: one for each weight, in the same order; any device, cast to the weight's type.
        device: that the group sends from.
    """
    stream = iter(tensors)
    for bucket in buckets_of(weights):
        dtype: torch.dtype = getattr(torch, bucket[0].dtype)
        parts = [next(stream).detach().to(device, dtype).reshape(-1) for _ in bucket]
        group.broadcast(parts[0].contiguous() if len(parts) == 1 else torch.cat(parts), 0).wait()


def receive(group: Any, weights: Sequence[Weight], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The other end of :func:`send`: names and tensors, bucket by bucket as they are consumed.

    A bucket's memory is never reused, so the tensors may be kept.
    """
    for bucket in buckets_of(weights):
        sizes = [math.prod(weight.shape) for weight in bucket]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, bucket[0].dtype), device=device)
        group.broadcast(flat, 0).wait()
        for weight, part in zip(bucket, torch.split(flat, sizes), strict=True):
            yield weight.name, part.view(weight.shape)


def join(backend: str, store: Any, rank: int, size: int, seconds: float) -> Any:
    """A process group apart from PyTorch's default one, in which trainer and servers would have to start together.

    Args:
        backend: ``"nccl"`` or ``"gloo"``.
        store: that its members meet at.
        rank: 0 is the trainer.
        size: number of members.
        seconds: timeout of a collective operation.
    """
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=seconds))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupNCCL(store, rank, size, options)

"""Counters that look at a training process from inside: storages, saved activations, messages, allocations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages behind tensors: views and tied weights count once."""
    sizes = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


@dataclass
class SavedActivations:
    """Distinct storages that autograd keeps for the backward pass, but for those of parameters."""

    parameters: list[Tensor]
    seen: dict[int, int] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)  # an address must not be given away while it is counted

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(self.seen.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is saved inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept):
            yield
        self.held.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Under ZeRO-3 a parameter is somewhere else each time it has been gathered.
        if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in self.parameters}:
            self.seen[storage.data_ptr()] = storage.nbytes()
            self.held.append(tensor.detach())
        return tensor


class MessageCounter(TorchDispatchMode):
    """Bytes of the collective operations inside, by operation, DDP's own included.

    An all-reduce counts twice its buffer (it is a reduce-scatter and an all-gather), everything else the larger of
    what goes in and what comes out: what a ring sends per rank, but for its factor ``(ranks - 1) / ranks``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            sides = [sum(t.nbytes for t in tree_flatten(arg)[0] if isinstance(t, Tensor)) for arg in args[:2]]
            self.bytes[name] += 2 * sides[0] if "allreduce" in name else max(sides)
        return result


class AllocationPeak:
    """How far allocations rise above where they were at the start, on this process's CPU."""

    def __init__(self) -> None:
        self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow every allocation inside."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        level = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            self.peak = max(self.peak, level)

"""Weighted means and sums over an iteration, right on any number of ranks."""

from __future__ import annotations

import torch
from torchmetrics import MaxMetric, MeanMetric, Metric, SumMetric

from spear_lightning.distributed.collectives import concatenate

_KINDS: dict[str, type[Metric]] = {"mean": MeanMetric, "sum": SumMetric, "max": MaxMetric}


class MetricStore:
    """Named torchmetrics that come into being when first updated.

    Ranks may see different names (a task type that only one of them played): :meth:`compute` agrees on the union first,
    so that every rank takes part in every reduction.

    Values may be tensors on any device. They are not looked at before :meth:`compute`, so nothing waits for a device.

    Example::

        store = MetricStore()
        store.mean("success", 1.0, weight=3)
        store.mean("success", 0.0, weight=1)
        store.compute()  # {"success": 0.75}
    """

    def __init__(self) -> None:
        self._metrics: dict[str, tuple[str, Metric]] = {}
        self._waiting: list[tuple[Metric, tuple[float | torch.Tensor, ...]]] = []

    def mean(self, name: str, value: float | torch.Tensor, weight: float | torch.Tensor = 1.0) -> None:
        """Add ``value`` with ``weight`` to the mean ``name`` (a weight of 0 adds nothing)."""
        self._add(name, "mean", value, weight)

    def sum(self, name: str, value: float | torch.Tensor) -> None:
        """Add ``value`` to the sum ``name``."""
        self._add(name, "sum", value)

    def max(self, name: str, value: float | torch.Tensor) -> None:
        """Take ``value`` into the maximum ``name``."""
        self._add(name, "max", value)

    def compute(self, device: torch.device | None = None) -> dict[str, float]:
        """Values over all ranks, sorted by name, and start anew. Every rank must call it.

        Args:
            device: on which the reduction runs (the module's device; NCCL reduces on GPUs only).

        Returns:
            One float per name; means that never had any weight are left out.
        """
        self._update()
        for name, kind in sorted(set(concatenate((name, kind) for name, (kind, _) in self._metrics.items()))):
            self._get(name, kind)
        values = {}
        for name, (_, metric) in sorted(self._metrics.items()):
            metric._update_count = max(1, metric._update_count)  # that only other ranks updated it is no mistake
            value = float((metric.to(device) if device is not None else metric).compute())
            if value == value and abs(value) != float("inf"):
                values[name] = value
        self._metrics.clear()
        return values

    def _add(self, name: str, kind: str, *numbers: float | torch.Tensor) -> None:
        # A tensor may be written to before it is looked at, and must not hold on to the graph that it comes from.
        kept = (x.detach().clone() if isinstance(x, torch.Tensor) else x for x in numbers)
        self._waiting.append((self._get(name, kind), tuple(kept)))

    def _update(self) -> None:
        """Take in what waits, in its order: one transfer a device."""
        tensors = [x for _, numbers in self._waiting for x in numbers if isinstance(x, torch.Tensor)]
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor.float().reshape(()))
        values = {device: iter(torch.stack(found).tolist()) for device, found in by_device.items()}
        for metric, numbers in self._waiting:
            metric.update(*(next(values[x.device]) if isinstance(x, torch.Tensor) else x for x in numbers))
        self._waiting.clear()

    def _get(self, name: str, kind: str) -> Metric:
        if name not in self._metrics:
            self._metrics[name] = (kind, _KINDS[kind](nan_strategy="ignore"))
        found, metric = self._metrics[name]
        if found != kind:
            raise ValueError(f"metric {name!r} is a {found}; it cannot also be a {kind}")
        return metric

"""Two or more ways to do the same work, run in turns on one machine: ratios that any machine can repeat."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def compare(
    sides: Mapping[str, Callable[[], Any]], repeats: int, *, work: float, unit: str, warm: int = 1
) -> dict[str, Any]:
    """Run every side in turns; each other side's time over the first one's is how much faster the first one is.

    Args:
        sides: what is compared, the one that is praised first.
        repeats: measured runs of each.
        work: done in one run, in ``unit``.
        unit: of the work.
        warm: runs of each that are not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(-warm, repeats):
        for name in names if turn % 2 else names[::-1]:  # whoever comes second finds the machine warmer
            started, used = time.perf_counter(), time.process_time()
            sides[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - used)
    first = names[0]
    result: dict[str, Any] = {
        name: {"seconds": spread(seconds[name]), "cpu_seconds": spread(processor[name])}
        | {f"{unit}_per_second": round(work / statistics.median(seconds[name]), 2)}
        for name in names
    }
    result["ratios"] = {
        name: spread([theirs / ours for ours, theirs in zip(seconds[first], seconds[name], strict=True)])
        for name in names[1:]
    }
    return result


def timed(sides: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int) -> dict[str, list[float]]:
    """Seconds of every side, run in turns.

    Args:
        sides: what is measured.
        repeats: measured runs of each.
        warm: runs of each that are not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm, repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest of some values."""
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
        "n": len(values),
    }


def machine() -> dict[str, Any]:
    """What was measured on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers")},
        "load_before": round(os.getloadavg()[0], 2),
    }

"""Two or more ways to do the same work, run in turns on one machine: ratios that any machine can repeat."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    times = timed(sides, repeats, warm=warm)
    first, *others = sides
    result: dict[str, Any] = {
        name: {"seconds": spread(taken.seconds), "cpu_seconds": spread(taken.processor)}
        | {f"{unit}_per_second": round(work / statistics.median(taken.seconds), 2)}
        for name, taken in times.items()
    }
    ours = times[first].seconds
    result["ratios"] = {
        name: spread([theirs / mine for mine, theirs in zip(ours, times[name].seconds, strict=True)]) for name in others
    }
    return result


@dataclass
class Times:
    """Of the runs of one side, in order.

    Attributes:
        seconds: that passed.
        processor: seconds that this process computed, over all its threads.
    """

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def timed(sides: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int) -> dict[str, Times]:
    """Run every side in turns.

    Args:
        sides: what is measured.
        repeats: measured runs of each.
        warm: runs of each that are not measured.
    """
    times = {name: Times() for name in sides}
    names = list(sides)
    for turn in range(-warm, repeats):
        for name in names if turn % 2 else names[::-1]:  # whoever comes second finds the machine warmer
            started, used = time.perf_counter(), time.process_time()
            sides[name]()
            if turn >= 0:
                times[name].seconds.append(time.perf_counter() - started)
                times[name].processor.append(time.process_time() - used)
    return times


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

"""Contenders measured in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Costs:
    """Of one contender, an entry a round.

    Attributes:
        wall: seconds on the clock.
        cpu: seconds of all threads of the process.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, Costs]:
    """Call each contender once a round.

    Args:
        contenders: by name.
        rounds: that are measured.
        warm_up: rounds before them.
    """
    costs = {name: Costs() for name in contenders}
    for number in range(-warm_up, rounds):
        for name, contender in contenders.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            contender()
            if number >= 0:
                costs[name].wall.append(time.perf_counter() - wall)
                costs[name].cpu.append(time.process_time() - cpu)
    return costs


def spread(values: list[float]) -> dict[str, Any]:
    """Median, extremes and the values themselves."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


def ratio(above: Costs, below: Costs) -> dict[str, Any]:
    """Costs of one contender by those of another, round by round."""
    return {
        kind: spread([a / b for a, b in zip(getattr(above, kind), getattr(below, kind), strict=True)])
        for kind in ("wall", "cpu")
    }

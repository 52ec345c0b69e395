"""Self-imitation: the buffer of own successes, and when how many of them are replayed (§3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from spear_lightning.algorithm.recalibration import (
    BaselineRecalibration,
    Decay,
    Recalibration,
    ReplayEntry,
    RewardBaseline,
)
from spear_lightning.utils.randomness import stream_seed

__all__ = [
    "BaselineRecalibration",
    "Decay",
    "Drain",
    "Gather",
    "Mix",
    "Recalibration",
    "ReplayBuffer",
    "ReplayEntry",
    "ReplaySample",
    "ReplaySchedule",
    "RewardBaseline",
    "is_admissible",
]

Gather = Callable[[list[float]], list[float]]
"""Concatenates a list over all ranks, in the same order on each, in double precision. Every rank must call it."""


def _alone(values: list[float]) -> list[float]:
    return values


@dataclass(frozen=True)
class ReplaySample:
    """An entry to be replayed now, with its recalibrated advantage Ã: above 0, where what is outgrown is left out."""

    entry: ReplayEntry
    advantage: float


def is_admissible(advantage: float, tool_calls: int, has_tools: bool) -> bool:
    """Whether a sample that carries a loss enters the buffer: A > 0 and, where the task has tools, one was used.

    Args:
        advantage: A of the sample (the mean over its tokens).
        tool_calls: turns of its episode that used a tool, or acted on the environment.
        has_tools: the task has tools: a success without any is a guess, and not to be imitated.
    """
    return advantage > 0 and (tool_calls > 0 or not has_tools)


# --- schedules: when and how much is replayed -------------------------------------------------------------------------


class ReplaySchedule(ABC):
    """Decides how many entries an iteration replays, over all ranks together."""

    empties: bool
    """Whether a draw empties the buffer."""

    @abstractmethod
    def quota(self, usable: int, capacity: int, fresh: int) -> int:
        """Entries to draw, given those usable, the buffer's capacity and the fresh ones of the iteration (B·G)."""

    @abstractmethod
    def limit(self, capacity: int) -> int:
        """Entries the buffer may hold."""

    def needs(self, capacity: int) -> int:
        """Usable entries that it waits for before it replays any."""
        return 1


@dataclass(frozen=True)
class Drain(ReplaySchedule):
    """Wait until ``ready·capacity`` entries are usable, replay up to ``capacity`` of them, then start afresh.

    The reference's way. Waiting for more than ``capacity`` entries means holding more: the buffer keeps up to twice
    what it waits for, so that entries which the baseline has overtaken do not stand in the way for ever.

    Args:
        ready: share of the capacity that must be usable; above 0.

    Raises:
        ValueError: ``ready`` is not above 0.
    """

    ready: float = 1.5

    empties = True

    def __post_init__(self) -> None:
        if self.ready <= 0:
            raise ValueError(f"Drain.ready must be above 0, not {self.ready}")

    def quota(self, usable: int, capacity: int, fresh: int) -> int:
        """See :class:`ReplaySchedule`."""
        return min(usable, capacity) if usable >= self.needs(capacity) else 0

    def limit(self, capacity: int) -> int:
        """See :class:`ReplaySchedule`."""
        return max(capacity, 2 * self.needs(capacity))

    def needs(self, capacity: int) -> int:
        """See :class:`ReplaySchedule`."""
        return math.ceil(self.ready * capacity)


@dataclass(frozen=True)
class Mix(ReplaySchedule):
    """Replay ``ratio·B·G`` entries in every iteration and keep them: each optimizer step sees fresh and replayed data.

    Args:
        ratio: entries replayed per fresh episode; above 0.

    Raises:
        ValueError: ``ratio`` is not above 0.
    """

    ratio: float = 0.25

    empties = False

    def __post_init__(self) -> None:
        if self.ratio <= 0:
            raise ValueError(f"Mix.ratio must be above 0, not {self.ratio}")

    def quota(self, usable: int, capacity: int, fresh: int) -> int:
        """See :class:`ReplaySchedule`."""
        return min(usable, max(1, int(self.ratio * fresh)))

    def limit(self, capacity: int) -> int:
        """See :class:`ReplaySchedule`."""
        return capacity


# --- the buffer -------------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """Own successes of the last few iterations.

    Each rank holds its own; with ``gather`` they act as one: what is dropped and what is drawn depends on the entries
    alone, not on which rank holds them.

    Args:
        capacity: entries over all ranks; over it the oldest go first.
        max_age: iterations an entry stays usable (published: 5, at most 10).
        schedule: when and how much is replayed; ``None`` for ``Mix(ratio=0.25)``.
        recalibration: what an entry is worth when it is drawn; ``None`` for ``BaselineRecalibration()``.
        filter_outgrown: leave out entries with Ã ≤ 0 (published). Without it they are replayed too, and the policy is
            pushed away from what used to be better than usual.

    Raises:
        ValueError: ``capacity`` or ``max_age`` below 1.

    Example:
        >>> buffer, baseline = ReplayBuffer(schedule=Mix(ratio=0.5)), RewardBaseline()
        >>> baseline.update([2.0, 4.0])
        >>> buffer.add([ReplayEntry("0/desk/1", "tokens", reward=10.0, advantage=1.2, iteration=0)], iteration=0)
        1
        >>> [drawn.advantage for drawn in buffer.draw(1, baseline, seed=0, fresh=2)]
        [7.0]
    """

    def __init__(
        self,
        capacity: int = 2048,
        max_age: int = 5,
        schedule: ReplaySchedule | None = None,
        recalibration: Recalibration | None = None,
        filter_outgrown: bool = True,
    ) -> None:
        for key, value in (("capacity", capacity), ("max_age", max_age)):
            if value < 1:
                raise ValueError(f"ReplayBuffer.{key} must be at least 1, not {value}")
        self.capacity = capacity
        self.max_age = max_age
        self.schedule = schedule or Mix()
        self.recalibration = recalibration or BaselineRecalibration()
        self.filter_outgrown = filter_outgrown
        self._entries: dict[str, ReplayEntry] = {}
        self._uses: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[ReplayEntry], iteration: int, *, gather: Gather = _alone) -> int:
        """Admit the successes of an iteration, then drop what is too old or too much.

        Args:
            entries: those with A ≤ 0 are not admitted. An entry with a known key replaces it.
            iteration: t now.
            gather: joins the ranks.

        Returns:
            Number of entries admitted on this rank.
        """
        admitted = [entry for entry in entries if entry.advantage > 0]
        for entry in admitted:
            self._entries[entry.key] = entry
        self._expire(iteration)
        self._shrink(gather)
        return len(admitted)

    def usable(self, iteration: int, baseline: RewardBaseline, normalize_std: bool = False) -> list[ReplaySample]:
        """The entries on this rank that may be replayed now: not too old, A > 0 and, with ``filter_outgrown``, Ã > 0.

        Args:
            iteration: t now.
            baseline: what recalibration measures against.
            normalize_std: whether fresh advantages are divided by a standard deviation.
        """
        young = (entry for entry in self._entries.values() if iteration - entry.iteration <= self.max_age)
        judged = (ReplaySample(entry, self.recalibration(entry, baseline, normalize_std)) for entry in young)
        return [drawn for drawn in judged if drawn.advantage > 0 or not self.filter_outgrown]

    def draw(
        self,
        iteration: int,
        baseline: RewardBaseline,
        *,
        seed: int,
        fresh: int,
        normalize_std: bool = False,
        gather: Gather = _alone,
    ) -> list[ReplaySample]:
        """Draw uniformly, without replacement, what this iteration replays.

        Each usable entry gets a number from a counter-based hash of (seed, iteration, key); the smallest over all ranks
        are drawn. So the draw does not depend on how many ranks there are, and ranks may get shares of different size.

        Args:
            iteration: t now.
            baseline: what recalibration measures against.
            seed: of the run.
            fresh: fresh episodes of the iteration over all ranks (B·G); turns, where entries are turns.
            normalize_std: whether fresh advantages are divided by a standard deviation.
            gather: joins the ranks.

        Returns:
            The drawn entries that this rank holds, in order of their numbers; empty if the schedule says not yet.
        """
        self._expire(iteration)
        numbered = sorted(
            (
                (_number("replay", seed, iteration, drawn.entry.key), drawn)
                for drawn in self.usable(iteration, baseline, normalize_std)
            ),
            key=lambda pair: pair[0],
        )
        everywhere = sorted(gather([number for number, _ in numbered]))
        quota = min(self.schedule.quota(len(everywhere), self.capacity, fresh), len(everywhere))
        if quota == 0:
            return []
        drawn = [one for number, one in numbered if number <= everywhere[quota - 1]]
        if self.schedule.empties:
            self.clear()
        else:
            for one in drawn:
                self._uses[one.entry.key] = self._uses.get(one.entry.key, 0) + 1
        return drawn

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._uses.clear()

    def statistics(self, iteration: int) -> dict[str, float]:
        """Of this rank: ``size``, mean ``age`` in iterations, and ``uses``, the mean number of draws of an entry."""
        size = len(self)
        ages = sum(iteration - entry.iteration for entry in self._entries.values())
        return {
            "size": float(size),
            "age": ages / size if size else 0.0,
            "uses": sum(self._uses.values()) / size if size else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain types, and the payloads as they are."""
        return {
            "entries": [
                {
                    "key": entry.key,
                    "payload": entry.payload,
                    "reward": float(entry.reward),
                    "advantage": float(entry.advantage),
                    "iteration": int(entry.iteration),
                    "uses": self._uses.get(entry.key, 0),
                }
                for entry in self._entries.values()
            ]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; capacity, age limit and schedule stay as configured."""
        self.clear()
        for saved in state["entries"]:
            fields = dict(saved)
            uses = fields.pop("uses")
            entry = ReplayEntry(**fields)
            self._entries[entry.key] = entry
            if uses:
                self._uses[entry.key] = uses

    def _expire(self, iteration: int) -> None:
        self._keep(lambda entry: iteration - entry.iteration <= self.max_age)

    def _shrink(self, gather: Gather) -> None:
        """Keep the youngest; among equals a hash of the key decides, so that it does not matter who holds them."""
        rank = {key: (float(entry.iteration), _number("capacity", key)) for key, entry in self._entries.items()}
        iterations, ties = gather([pair[0] for pair in rank.values()]), gather([pair[1] for pair in rank.values()])
        limit = self.schedule.limit(self.capacity)
        if len(iterations) > limit:
            last = sorted(zip(iterations, ties, strict=True), reverse=True)[limit - 1]
            self._keep(lambda entry: rank[entry.key] >= last)

    def _keep(self, wanted: Callable[[ReplayEntry], bool]) -> None:
        self._entries = {key: entry for key, entry in self._entries.items() if wanted(entry)}
        self._uses = {key: uses for key, uses in self._uses.items() if key in self._entries}


def _number(*names: int | str) -> float:
    """A float64 in [0, 1) that depends on the names alone."""
    return (stream_seed(*names) >> 10) / 2.0**53

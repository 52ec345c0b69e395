"""Self-imitation (§3): the buffer of own successes, what they are worth now, and when how many of them are replayed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from typing_extensions import override

from spear_lightning.algorithm.filters import ZERO_DEVIATION
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import Above0, Positive, Share, in_range

Gather = Callable[[list[float]], list[float]]
"""Concatenates a list over all ranks, in the same order on each, in double precision. Every rank must call it."""


@dataclass(frozen=True)
class ReplayEntry:
    """One success: an episode, or a turn of one.

    Attributes:
        key: unique name over all ranks and iterations, for example ``"iteration/task/index/turn"``.
        payload: what is trained on; opaque here, saved as it is.
        reward: what it was worth when it was played: R less the penalty of its turns (their mean).
        advantage: A when it was played.
        iteration: t when it was played.
    """

    key: str
    payload: Any
    reward: float
    advantage: float
    iteration: int


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


# --- what a past success is worth now ---------------------------------------------------------------------------------


@in_range
class RewardBaseline:
    """What is usual by now: a percentile of recent groups' mean rewards (P50), first in, first out.

    On several ranks, give each the values of all ranks: they must agree.

    Args:
        capacity: number of groups remembered.
        percentile: of the mean rewards that a success must exceed to be replayed; 50 is the median.
        groups: which groups enter: ``all``, or those ``kept`` by the group filter (as published).
        current: whether an iteration's groups enter before it draws from replay; published: after.
    """

    def __init__(
        self,
        capacity: Positive = 10240,
        percentile: Annotated[float, Ge(0), Le(100)] = 50.0,
        groups: Literal["all", "kept"] = "all",
        current: bool = True,
    ) -> None:
        self.capacity, self.percentile = capacity, percentile
        self.groups, self.current = groups, current
        self._means: deque[float] = deque(maxlen=capacity)
        self._stds: deque[float] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._means)

    def update(self, group_means: Iterable[float], group_stds: Iterable[float] | None = None) -> None:
        """Remember the groups of an iteration.

        Args:
            group_means: mean reward of each group.
            group_stds: what the advantages of each group were divided by.
        """
        self._means.extend(map(float, group_means))
        if group_stds is not None:
            self._stds.extend(map(float, group_stds))

    @property
    def median(self) -> float:
        """The median of the mean rewards; 0 before the first update."""
        return self._percentile(50.0)

    @property
    def level(self) -> float:
        """The configured percentile of the mean rewards; 0 before the first update."""
        return self._percentile(self.percentile)

    def _percentile(self, percentile: float) -> float:
        return float(np.percentile(self._means, percentile)) if self._means else 0.0

    @property
    def std_median(self) -> float:
        """Median of the deviations *of groups that have one*; 1 if there is none.

        Where most groups fail throughout, the median over all groups would be 0, and dividing by it would make replayed
        advantages a million times too large.
        """
        positive = [std for std in self._stds if std > ZERO_DEVIATION]
        return float(np.median(positive)) if positive else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain lists of floats."""
        return {"means": list(self._means), "stds": list(self._stds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; what exceeds this capacity is forgotten, oldest first."""
        self._means = deque(state["means"], maxlen=self.capacity)
        self._stds = deque(state["stds"], maxlen=self.capacity)


class Recalibration(ABC):
    """Gives a past success its advantage of today."""

    @abstractmethod
    def __call__(self, entry: ReplayEntry, baseline: RewardBaseline) -> float:
        """Ã of ``entry``; only entries with Ã > 0 are replayed, unless the buffer's ``filter_outgrown`` is off."""


@dataclass(frozen=True)
class BaselineRecalibration(Recalibration):
    """``Ã = R − P50``, over the median deviation where advantages are normalised: what is usual by now is dropped.

    Args:
        normalize_std: divide by the median of what fresh advantages were divided by (1 where they are not). Published:
            not with GiGPO, though it divides fresh ones.
    """

    normalize_std: bool = True

    @override
    def __call__(self, entry: ReplayEntry, baseline: RewardBaseline) -> float:
        excess = entry.reward - baseline.level
        return excess / baseline.std_median if self.normalize_std else excess


@in_range
@dataclass(frozen=True)
class Decay(Recalibration):
    """``Ã = d·A``: the old advantage, weakened.

    Args:
        factor: d, in (0, 1].
    """

    factor: Share = 1.0

    @override
    def __call__(self, entry: ReplayEntry, baseline: RewardBaseline) -> float:
        return self.factor * entry.advantage


# --- schedules: when and how much is replayed -------------------------------------------------------------------------


class ReplaySchedule(ABC):
    """Decides how many entries an iteration replays, over all ranks together."""

    empties: bool
    """Whether a draw empties the buffer."""

    @abstractmethod
    def quota(self, usable: int, capacity: int, fresh: int) -> int:
        """Entries to draw, given those usable, the buffer's capacity and the fresh ones of the iteration (B·G)."""

    def limit(self, capacity: int) -> int:
        """Entries the buffer may hold."""
        return capacity

    def needs(self, capacity: int) -> int:
        """Usable entries that it waits for before it replays any."""
        return 1


@in_range
@dataclass(frozen=True)
class Drain(ReplaySchedule):
    """Wait until ``ready·capacity`` entries are usable, replay up to ``capacity`` of them, then start afresh.

    The reference's way. Waiting for more than ``capacity`` entries means holding more: the buffer keeps up to twice
    what it waits for, so that entries which the baseline has overtaken do not stand in the way for ever.

    Args:
        ready: share of the capacity that must be usable; above 0.
    """

    ready: Above0 = 1.5

    empties = True

    @override
    def quota(self, usable: int, capacity: int, fresh: int) -> int:
        return min(usable, capacity) if usable >= self.needs(capacity) else 0

    @override
    def limit(self, capacity: int) -> int:
        return max(capacity, 2 * self.needs(capacity))

    @override
    def needs(self, capacity: int) -> int:
        return math.ceil(self.ready * capacity)


@in_range
@dataclass(frozen=True)
class Mix(ReplaySchedule):
    """Replay ``ratio·B·G`` entries in every iteration and keep them: each optimizer step sees fresh and replayed data.

    Args:
        ratio: entries replayed per fresh episode; above 0.
    """

    ratio: Above0 = 0.25

    empties = False

    @override
    def quota(self, usable: int, capacity: int, fresh: int) -> int:
        return min(usable, max(1, int(self.ratio * fresh)))


# --- the buffer -------------------------------------------------------------------------------------------------------


@in_range
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
        capacity: Positive = 2048,
        max_age: Positive = 5,
        schedule: ReplaySchedule | None = None,
        recalibration: Recalibration | None = None,
        filter_outgrown: bool = True,
    ) -> None:
        self.capacity = capacity
        self.max_age = max_age
        self.schedule = schedule or Mix()
        self.recalibration = recalibration or BaselineRecalibration()
        self.filter_outgrown = filter_outgrown
        self._entries: dict[str, ReplayEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Iterable[ReplayEntry], iteration: int, *, gather: Gather = list) -> int:
        """Admit the successes of an iteration, then drop what is too old or too much.

        Args:
            entries: those with A ≤ 0 are not admitted. An entry with a known key replaces it.
            iteration: t now.
            gather: joins the ranks.

        Returns:
            Number of entries admitted on this rank.
        """
        admitted = [entry for entry in entries if entry.advantage > 0]
        self._entries |= {entry.key: entry for entry in admitted}
        self._entries = self._young(iteration)
        self._shrink(gather)
        return len(admitted)

    def usable(self, iteration: int, baseline: RewardBaseline) -> list[ReplaySample]:
        """The entries on this rank that may be replayed now: not too old, A > 0 and, with ``filter_outgrown``, Ã > 0.

        Args:
            iteration: t now.
            baseline: what recalibration measures against.
        """
        young = self._young(iteration).values()
        judged = (ReplaySample(entry, self.recalibration(entry, baseline)) for entry in young)
        return [drawn for drawn in judged if drawn.advantage > 0 or not self.filter_outgrown]

    def draw(
        self,
        iteration: int,
        baseline: RewardBaseline,
        *,
        seed: int,
        fresh: int,
        gather: Gather = list,
    ) -> list[ReplaySample]:
        """Draw uniformly, without replacement, what this iteration replays.

        Each usable entry gets a number from a counter-based hash of (seed, iteration, key); the smallest over all ranks
        are drawn. So the draw does not depend on how many ranks there are, and ranks may get shares of different size.

        Args:
            iteration: t now.
            baseline: what recalibration measures against.
            seed: of the run.
            fresh: fresh episodes of the iteration over all ranks (B·G); turns, where entries are turns.
            gather: joins the ranks.

        Returns:
            The drawn entries that this rank holds, in order of their numbers; empty if the schedule says not yet.
        """
        self._entries = self._young(iteration)
        usable = self.usable(iteration, baseline)
        numbered = [(_number("replay", seed, iteration, one.entry.key), one) for one in usable]
        numbered.sort(key=lambda pair: pair[0])
        everywhere = sorted(gather([number for number, _ in numbered]))
        quota = min(self.schedule.quota(len(everywhere), self.capacity, fresh), len(everywhere))
        if quota == 0:
            return []
        drawn = [one for number, one in numbered if number <= everywhere[quota - 1]]
        if self.schedule.empties:
            self._entries = {}
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Plain types, and the payloads as they are."""
        numbers = ("reward", "advantage")  # may be numpy's
        entries = self._entries.values()
        return {"entries": [vars(one) | {name: float(getattr(one, name)) for name in numbers} for one in entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; capacity, age limit and schedule stay as configured."""
        names = [field.name for field in fields(ReplayEntry)]  # older checkpoints hold more
        entries = (ReplayEntry(**{name: saved[name] for name in names}) for saved in state["entries"])
        self._entries = {entry.key: entry for entry in entries}

    def _young(self, iteration: int) -> dict[str, ReplayEntry]:
        return {key: entry for key, entry in self._entries.items() if iteration - entry.iteration <= self.max_age}

    def _shrink(self, gather: Gather) -> None:
        """Keep the youngest; among equals a hash of the key decides, so that it does not matter who holds them."""
        rank = {key: (float(entry.iteration), _number("capacity", key)) for key, entry in self._entries.items()}
        iterations, ties = gather([pair[0] for pair in rank.values()]), gather([pair[1] for pair in rank.values()])
        limit = self.schedule.limit(self.capacity)
        if len(iterations) > limit:
            last = sorted(zip(iterations, ties, strict=True), reverse=True)[limit - 1]
            self._entries = {key: entry for key, entry in self._entries.items() if rank[key] >= last}


def _number(*names: int | str) -> float:
    """A float64 in [0, 1) that depends on the names alone."""
    return (stream_seed(*names) >> 10) / 2.0**53

"""What a past success is worth now: the reward baseline, and recalibration against it (§3)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from spear_lightning.algorithm.filters import ZERO_DEVIATION


class RewardBaseline:
    """What is usual by now: a percentile of recent groups' mean rewards (P50), first in, first out.

    On several ranks, give each the values of all ranks: they must agree.

    Args:
        capacity: number of groups remembered.
        percentile: of the mean rewards that a success must exceed to be replayed; 50 is the median.
        groups: which groups enter: ``all``, or those ``kept`` by the group filter (as published).
        current: whether an iteration's groups enter before it draws from replay; published: after.

    Raises:
        ValueError: ``capacity`` below 1, or ``percentile`` not between 0 and 100.
    """

    def __init__(
        self,
        capacity: int = 10240,
        percentile: float = 50.0,
        groups: Literal["all", "kept"] = "all",
        current: bool = True,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"data.baseline.capacity must be at least 1, not {capacity}")
        if not 0 <= percentile <= 100:
            raise ValueError(f"data.baseline.percentile must be between 0 and 100 (50 is P50), not {percentile}")
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


class Recalibration(ABC):
    """Gives a past success its advantage of today."""

    @abstractmethod
    def __call__(self, entry: ReplayEntry, baseline: RewardBaseline, normalize_std: bool) -> float:
        """Ã of ``entry``; only entries with Ã > 0 are replayed, unless the buffer's ``filter_outgrown`` is off."""


@dataclass(frozen=True)
class BaselineRecalibration(Recalibration):
    """``Ã = R − P50``, over the median deviation where advantages are normalised: what is usual by now is dropped.

    Args:
        normalize_std: divide by the median of what fresh advantages were divided by; ``None`` does where they are
            divided. (Published: not with GiGPO, though it divides fresh ones.)
    """

    normalize_std: bool | None = None

    def __call__(self, entry: ReplayEntry, baseline: RewardBaseline, normalize_std: bool) -> float:
        """See :class:`Recalibration`."""
        excess = entry.reward - baseline.level
        divide = normalize_std if self.normalize_std is None else self.normalize_std
        return excess / baseline.std_median if divide else excess


@dataclass(frozen=True)
class Decay(Recalibration):
    """``Ã = d·A``: the old advantage, weakened.

    Args:
        factor: d, in (0, 1].

    Raises:
        ValueError: ``factor`` out of range.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(f"Decay.factor must be in (0, 1], not {self.factor}")

    def __call__(self, entry: ReplayEntry, baseline: RewardBaseline, normalize_std: bool) -> float:
        """See :class:`Recalibration`."""
        return self.factor * entry.advantage

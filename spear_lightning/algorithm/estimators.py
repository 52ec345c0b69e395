"""Advantage estimators as small objects that a configuration names by class path.

All take the same table with one row per turn. A turn is worth its episode's reward less the turn's own penalty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from spear_lightning.algorithm import advantages
from spear_lightning.algorithm.advantages import GiGPOMode, Weighting

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TurnTable:
    """The turns of a whole rollout batch, one row each; on several ranks, of all ranks.

    Attributes:
        returns: reward R of the turn's episode, penalties not taken off, float64 ``(turns,)``.
        penalties: of the turn itself, not negative, float64 ``(turns,)``.
        step_rewards: the environment's own reward of the turn, which GiGPO discounts, float64 ``(turns,)``.
        groups: number of the turn's group (task), int ``(turns,)``.
        episodes: number of the turn's episode, unique in the table, int ``(turns,)``; turns of an episode in order.
        anchors: name of the state each turn starts from; only GiGPO looks at it.
        samples: what is a training sample of its own, each ``turn`` (step-wise context) or each ``episode``
            (conversation context). With one sample an episode, baselines are over episodes, whatever their weighting.
    """

    returns: FloatArray
    penalties: FloatArray
    step_rewards: FloatArray
    groups: IntArray
    episodes: IntArray
    anchors: Sequence[str]
    samples: Literal["turn", "episode"] = "turn"

    def __post_init__(self) -> None:
        columns = ("returns", "penalties", "step_rewards", "groups", "episodes", "anchors")
        lengths = {name: len(getattr(self, name)) for name in columns}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a turn table needs one row per turn in every column: {lengths}")

    def weighting(self, wanted: Weighting) -> Weighting:
        """What a baseline is taken over."""
        return wanted if self.samples == "turn" else "episode"

    def per_episode(self) -> tuple[FloatArray, IntArray, IntArray]:
        """R and group of each episode, and the number of each turn's episode in them."""
        _, first, episode = np.unique(np.asarray(self.episodes), return_index=True, return_inverse=True)
        return np.asarray(self.returns, dtype=np.float64)[first], np.asarray(self.groups)[first], episode

    def deviations(self, weighting: Weighting) -> FloatArray:
        """Sample standard deviation of each group, in ascending order of its number, ``(groups,)``.

        Args:
            weighting: over its turns (of what they are worth), or over its episodes (of R).
        """
        values, groups = np.asarray(self.returns) - np.asarray(self.penalties), np.asarray(self.groups)
        if self.weighting(weighting) == "episode":
            values, groups, _ = self.per_episode()
        first = np.unique(groups, return_index=True)[1]
        return advantages.group_moments(values, groups).std.numpy()[first]


class AdvantageEstimator(ABC):
    """Turns rewards into advantages."""

    @property
    @abstractmethod
    def normalizes_std(self) -> bool:
        """Whether advantages are divided by a standard deviation."""

    @abstractmethod
    def __call__(self, table: TurnTable) -> FloatArray:
        """The advantage of each turn, float64 ``(turns,)``."""

    def deviations(self, table: TurnTable) -> FloatArray:
        """What the advantages of each group, in ascending order of its number, are divided by, ``(groups,)``.

        Replay divides recalibrated advantages by the median of these, so that they are on the scale of fresh ones.
        """
        return np.ones(len(np.unique(table.groups)))


@dataclass(frozen=True)
class GRPO(AdvantageEstimator):
    """Group-relative advantage (:func:`~spear_lightning.algorithm.advantages.grpo_turns`).

    Without the division it is Dr.GRPO.

    Args:
        normalize_std: divide by the group's standard deviation.
        weighting: take mean and deviation over each ``turn`` (long episodes weigh more, as published) or each
            ``episode``.
        eps: added to the deviation.
    """

    normalize_std: bool = True
    weighting: Weighting = "turn"
    eps: float = 1e-6

    @property
    def normalizes_std(self) -> bool:
        """See :class:`AdvantageEstimator`."""
        return self.normalize_std

    def __call__(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`."""
        return advantages.grpo_turns(
            table.returns,
            table.penalties,
            table.groups,
            table.episodes,
            normalize_std=self.normalize_std,
            weighting=table.weighting(self.weighting),
            eps=self.eps,
        ).numpy()

    def deviations(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`."""
        return table.deviations(self.weighting) if self.normalize_std else super().deviations(table)


@dataclass(frozen=True)
class RLOO(AdvantageEstimator):
    """Leave-one-out advantage (:func:`~spear_lightning.algorithm.advantages.rloo`)."""

    @property
    def normalizes_std(self) -> bool:
        """See :class:`AdvantageEstimator`."""
        return False

    def __call__(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`."""
        rewards, groups, episode = table.per_episode()
        return advantages.rloo(rewards, groups).numpy()[episode] - table.penalties


@dataclass(frozen=True)
class ReinforcePlusPlusBaseline(AdvantageEstimator):
    """REINFORCE++ with group baseline (:func:`~spear_lightning.algorithm.advantages.reinforce_plus_plus_baseline`).

    Whitens over the table it is given: all ranks must be in it.

    Args:
        eps: added to the standard deviation of the batch.
    """

    eps: float = 1e-6

    @property
    def normalizes_std(self) -> bool:
        """See :class:`AdvantageEstimator`."""
        return True

    def __call__(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`."""
        rewards, groups, episode = table.per_episode()
        whitened = advantages.reinforce_plus_plus_baseline(rewards, groups, eps=self.eps).numpy()
        return whitened[episode] - table.penalties / (self._deviation(table) or 1.0)

    def deviations(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`: the same for all groups."""
        return super().deviations(table) * self._deviation(table)

    def _deviation(self, table: TurnTable) -> float:
        rewards, groups, _ = table.per_episode()
        centred = advantages.grpo(rewards, groups, normalize_std=False)
        return float(advantages.group_moments(centred, [0] * len(centred)).std[0])


@dataclass(frozen=True)
class GiGPO(AdvantageEstimator):
    """Group-in-group advantage (:func:`~spear_lightning.algorithm.advantages.gigpo`).

    Args:
        gamma: γ of the discounted step returns, in [0, 1].
        mode: ``mean_norm``, or ``mean_std_norm`` to divide by standard deviations as well.
        step_weight: w, weight of the step level.
        episode_weighting: ``turn`` (long episodes weigh more in the baseline, as in the reference) or ``episode``.
        eps: added to standard deviations.

    Raises:
        ValueError: ``gamma`` is out of range.
    """

    gamma: float = 0.95
    mode: GiGPOMode = "mean_norm"
    step_weight: float = 1.0
    episode_weighting: Weighting = "turn"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"GiGPO.gamma must be in [0, 1], not {self.gamma}")

    @property
    def normalizes_std(self) -> bool:
        """See :class:`AdvantageEstimator`."""
        return self.mode == "mean_std_norm"

    def __call__(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`."""
        return advantages.gigpo(
            table.returns,
            advantages.discounted_returns(table.step_rewards, table.episodes, self.gamma),
            table.groups,
            table.episodes,
            table.anchors,
            mode=self.mode,
            step_weight=self.step_weight,
            episode_weighting=table.weighting(self.episode_weighting),
            penalties=table.penalties,
            eps=self.eps,
        ).numpy()

    def deviations(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`: of the episode level."""
        return table.deviations(self.episode_weighting) if self.normalizes_std else super().deviations(table)

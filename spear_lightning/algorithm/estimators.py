"""Advantage estimators as small objects that a configuration names by class path.

All take the same table with one row per turn; those that work on episodes look at each episode once and give all its
turns the same advantage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spear_lightning.algorithm import advantages
from spear_lightning.algorithm.advantages import EpisodeWeighting, GiGPOMode, Singleton

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TurnTable:
    """The turns of a whole rollout batch, one row each; on several ranks, of all ranks.

    Attributes:
        episode_rewards: reward R of the turn's episode, float64 ``(turns,)``.
        step_rewards: share of R that belongs to the turn, float64 ``(turns,)``.
        groups: number of the turn's group (task), int ``(turns,)``.
        episodes: number of the turn's episode, unique in the table, int ``(turns,)``; turns of an episode in order.
        anchors: name of the state each turn starts from; only GiGPO looks at it.
    """

    episode_rewards: FloatArray
    step_rewards: FloatArray
    groups: IntArray
    episodes: IntArray
    anchors: Sequence[str]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self.__dataclass_fields__}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a turn table needs one row per turn in every column: {lengths}")


class AdvantageEstimator(ABC):
    """Turns rewards into advantages."""

    @property
    @abstractmethod
    def normalizes_std(self) -> bool:
        """Whether advantages are divided by a standard deviation: replay then divides by one too.

        Together with a penalty for invalid actions this is dangerous: in a group that fails throughout, the penalty is
        the only difference, and the division makes it as large as a success.
        """

    @abstractmethod
    def __call__(self, table: TurnTable) -> FloatArray:
        """The advantage of each turn, float64 ``(turns,)``."""


class _EpisodeEstimator(AdvantageEstimator):
    """One advantage per episode, given to all its turns."""

    def __call__(self, table: TurnTable) -> FloatArray:
        """See :class:`AdvantageEstimator`."""
        _, first, episode = np.unique(np.asarray(table.episodes), return_index=True, return_inverse=True)
        rewards = np.asarray(table.episode_rewards, dtype=np.float64)[first]
        return self._per_episode(rewards, np.asarray(table.groups)[first])[episode]

    @abstractmethod
    def _per_episode(self, rewards: FloatArray, groups: IntArray) -> FloatArray:
        """The advantage of each episode, ``(episodes,)``."""


@dataclass(frozen=True)
class GRPO(_EpisodeEstimator):
    """Group-relative advantage (:func:`~spear_lightning.algorithm.advantages.grpo`); Dr.GRPO without the division.

    Args:
        normalize_std: divide by the group's standard deviation.
        eps: added to it.
    """

    normalize_std: bool = True
    eps: float = 1e-6

    @property
    def normalizes_std(self) -> bool:
        """See :class:`AdvantageEstimator`."""
        return self.normalize_std

    def _per_episode(self, rewards: FloatArray, groups: IntArray) -> FloatArray:
        return advantages.grpo(rewards, groups, normalize_std=self.normalize_std, eps=self.eps).numpy()


@dataclass(frozen=True)
class RLOO(_EpisodeEstimator):
    """Leave-one-out advantage (:func:`~spear_lightning.algorithm.advantages.rloo`)."""

    @property
    def normalizes_std(self) -> bool:
        """See :class:`AdvantageEstimator`."""
        return False

    def _per_episode(self, rewards: FloatArray, groups: IntArray) -> FloatArray:
        return advantages.rloo(rewards, groups).numpy()


@dataclass(frozen=True)
class ReinforcePlusPlusBaseline(_EpisodeEstimator):
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

    def _per_episode(self, rewards: FloatArray, groups: IntArray) -> FloatArray:
        return advantages.reinforce_plus_plus_baseline(rewards, groups, eps=self.eps).numpy()


@dataclass(frozen=True)
class GiGPO(AdvantageEstimator):
    """Group-in-group advantage (:func:`~spear_lightning.algorithm.advantages.gigpo`).

    Args:
        gamma: γ of the discounted step returns, in [0, 1].
        mode: ``mean_norm``, or ``mean_std_norm`` to divide by standard deviations as well.
        step_weight: w, weight of the step level.
        episode_weighting: ``turn`` (long episodes weigh more in the baseline, as in the reference) or ``episode``.
        singleton: what a turn that shares its anchor with no other gets at step level: its return (``raw``) or
            ``zero``.
        eps: added to standard deviations.

    Raises:
        ValueError: ``gamma`` is out of range.
    """

    gamma: float = 0.95
    mode: GiGPOMode = "mean_norm"
    step_weight: float = 1.0
    episode_weighting: EpisodeWeighting = "turn"
    singleton: Singleton = "raw"
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
            np.asarray(table.episode_rewards, dtype=np.float64),
            advantages.discounted_returns(np.asarray(table.step_rewards, dtype=np.float64), table.episodes, self.gamma),
            table.groups,
            table.episodes,
            table.anchors,
            mode=self.mode,
            step_weight=self.step_weight,
            episode_weighting=self.episode_weighting,
            eps=self.eps,
            singleton=self.singleton,
        ).numpy()

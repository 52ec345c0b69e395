"""An episode together with what the algorithm made of it, and the rollout they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from spear_lightning.environments.base import Split
from spear_lightning.rollout.episode import Episode


@dataclass(slots=True)
class ScoredEpisode:
    """An episode with its reward, filters and advantages.

    Attributes:
        episode: as played.
        reward: composed episode reward R (``algorithm.rewards``).
        parts: the parts that R is the sum of, by name: ``outcome``, ``tool`` (weighted by μ), ``format``.
        penalties: what each turn pays for itself, not negative, float64 ``(turns,)``.
        step_rewards: the environment's own reward of each turn, float64 ``(turns,)`` (GiGPO discounts these).
        filters: names of the quality filters that apply to the whole episode (``overlong``, ``incomplete``,
            ``repetitive``, ``unreadable``), empty if none.
        keep: one per turn; false takes the turn out of the loss.
        group_kept: false if the whole group was dropped (smallest reward deviation, or none).
        in_batch: false if the group carries no signal and others were sought in its place: it is dropped, and counts in
            nothing that is computed of the batch.
        advantages: one per turn, float64 ``(turns,)``; zeros until estimated.
        group_mean: mean R of the group.
        group_std: sample standard deviation of R in the group.
    """

    episode: Episode
    reward: float
    parts: dict[str, float]
    penalties: npt.NDArray[np.float64]
    step_rewards: npt.NDArray[np.float64]
    filters: frozenset[str] = frozenset()
    keep: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    group_kept: bool = True
    in_batch: bool = True
    advantages: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    group_mean: float = 0.0
    group_std: float = 0.0

    def worth(self, turns: Sequence[int] | None = None) -> float:
        """R less the mean penalty of some turns: what a sample that is made of them is worth.

        Args:
            turns: their numbers; ``None`` for all.
        """
        penalties = self.penalties if turns is None else self.penalties[list(turns)]
        return self.reward - (float(penalties.mean()) if len(penalties) else 0.0)


class Rollout:
    """All episodes this rank played in one phase.

    Not a dataclass: Lightning would look into it for tensors to move and to round.

    Attributes:
        split: which tasks were played.
        iteration: number of the SPEAR iteration (epoch) it belongs to.
        episodes: scored, in order of (group, index). Aborted ones are not among them.
        aborted: episodes whose environment failed.
        seconds: wall-clock by phase: ``generation``, ``environment``, ``sync`` (handing weights to the engine),
            ``other``.
    """

    __slots__ = ("aborted", "episodes", "iteration", "seconds", "split")

    def __init__(
        self,
        split: Split,
        iteration: int,
        episodes: list[ScoredEpisode],
        aborted: list[Episode],
        seconds: dict[str, float],
    ) -> None:
        self.split, self.iteration = split, iteration
        self.episodes, self.aborted, self.seconds = episodes, aborted, seconds

    def extend(self, other: Rollout) -> None:
        """Take in what this rank played next in the same phase, groups with larger numbers; seconds add up."""
        self.episodes += other.episodes
        self.aborted += other.aborted
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def to(self, device: object) -> Rollout:
        """Itself: there is nothing on a device. Lightning calls it for each batch."""
        return self

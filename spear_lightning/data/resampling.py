"""DAPO's dynamic sampling: groups whose episodes all got the same reward are replaced by groups of fresh tasks.

Nothing is remembered: which tasks a round takes depends on seed, iteration and how many groups it finds missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spear_lightning.data.scoring import groups_with_signal
from spear_lightning.rollout.episode import Rollout
from spear_lightning.rollout.specs import TrainingRollouts


@dataclass(frozen=True, slots=True)
class Resampling:
    """What it took to fill an iteration, over all ranks.

    Attributes:
        rounds: played after the first.
        groups: played in them.
        signal: groups of the iteration whose rewards differ, at most B.
    """

    rounds: int
    groups: int
    signal: int

    def metrics(self) -> dict[str, float]:
        """By the names of docs/metrics.md."""
        return {
            "rollout/resample_rounds": self.rounds,
            "rollout/resampled_groups": self.groups,
            "rollout/signal_groups": self.signal,
        }


def play_until_signal(play: Callable[[range], Rollout], settings: TrainingRollouts) -> tuple[Rollout, Resampling]:
    """Play B groups, then as many others as are without signal, until B have one or the rounds are used up.

    Every rank must call it.

    Args:
        play: plays and scores the groups with these numbers, those of this rank. Every rank calls it for every round,
            also where a round has no group for it.
        settings: B and the number of further rounds.

    Returns:
        The episodes of all rounds on this rank, and what it took.
    """
    rollout = play(range(settings.tasks))
    missing = settings.tasks - len(groups_with_signal(rollout.episodes))
    played, rounds = settings.tasks, 0
    while missing and rounds < settings.resample:
        rollout.extend(play(range(played, played + missing)))
        played, rounds = played + missing, rounds + 1
        missing = settings.tasks - len(groups_with_signal(rollout.episodes))
    return rollout, Resampling(rounds, played - settings.tasks, settings.tasks - missing)

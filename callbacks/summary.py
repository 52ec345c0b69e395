"""What several callbacks want to know of a rollout, in sums that add up over ranks and over parts of a phase."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn

from spear_lightning.data.scoring import Rollout
from spear_lightning.distributed.collectives import gather


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Sums over episodes; ``a + b`` summarises both.

    Attributes:
        episodes: played to an end (aborted ones are not among them).
        successes: of these.
        aborted: episodes whose environment failed.
        reward: sum of the composed rewards R.
        entropy: sum of the policy's entropy over the generated tokens whose entropy is known, in nats.
        tokens: number of these tokens.
        turns: number of turns.
        invalid: turns whose response did not have the required form.
        kind_episodes: episodes by task type.
        kind_successes: successes by task type.
    """

    episodes: int = 0
    successes: int = 0
    aborted: int = 0
    reward: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    turns: int = 0
    invalid: int = 0
    kind_episodes: Counter[str] = field(default_factory=Counter)
    kind_successes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: RolloutSummary) -> RolloutSummary:
        return RolloutSummary(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @classmethod
    def of(cls, rollout: Rollout) -> RolloutSummary:
        """Summarise the episodes of this rank."""
        scored = rollout.episodes
        known = [values[~np.isnan(values)] for item in scored for values in (t.entropies for t in item.episode.turns)]
        return cls(
            episodes=len(scored),
            successes=sum(item.episode.success for item in scored),
            aborted=len(rollout.aborted),
            reward=math.fsum(item.reward for item in scored),
            entropy=math.fsum(float(values.sum(dtype=np.float64)) for values in known),
            tokens=sum(len(values) for values in known),
            turns=sum(len(item.episode.turns) for item in scored),
            invalid=sum(item.episode.invalid for item in scored),
            kind_episodes=Counter(item.episode.task.task_type for item in scored),
            kind_successes=Counter(item.episode.task.task_type for item in scored if item.episode.success),
        )

    @classmethod
    def over_ranks(cls, rollout: Rollout) -> RolloutSummary:
        """Summarise the episodes of all ranks. Every rank must call it."""
        return reduce(add, gather(cls.of(rollout)))

    @property
    def success(self) -> float:
        """Share of episodes that succeeded; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def mean_reward(self) -> float:
        """Mean composed reward per episode; NaN without episodes."""
        return self.reward / self.episodes if self.episodes else math.nan

    @property
    def mean_entropy(self) -> float:
        """Mean policy entropy per generated token in nats; NaN where no token's entropy is known."""
        return self.entropy / self.tokens if self.tokens else math.nan


def completed_iterations(trainer: pl.Trainer) -> int:
    """Number of iterations the policy that is evaluated now has behind it.

    During ``fit`` Lightning validates before it counts the epoch; the sanity check comes before the first one.
    """
    within_epoch = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return trainer.current_epoch + int(within_epoch)

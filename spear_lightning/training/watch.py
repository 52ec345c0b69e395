"""Warnings of a run under way: what is configured to act and never does, filters that take much, missing signal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

from spear_lightning.data.resampling import Resampling
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.hooks import Learner

_PATIENCE = 20
"""Iterations without an effect after which a user should know."""

_MUCH = 0.3
"""Share of filtered episodes from which on a user should know."""


class Watch:
    """Warns of what has been wrong for some iterations on end: of each thing once in a run."""

    def __init__(self) -> None:
        self._spells: Counter[str] = Counter()
        self._told: set[str] = set()

    def note(self, name: str, wrong: bool, message: str, patience: int = 1) -> None:
        """Take note of an iteration.

        Args:
            name: of the thing.
            wrong: whether it is wrong in this iteration.
            message: the warning.
            patience: iterations on end that it may take.
        """
        self._spells[name] = self._spells[name] + 1 if wrong else 0
        if self._spells[name] >= patience and name not in self._told:
            self._told.add(name)
            rank_zero_warn(message)

    def idle_parts(self, module: Learner, values: Mapping[str, float]) -> None:
        """Parts that could have acted for 20 iterations on end and have not.

        Args:
            module: that trains.
            values: its metrics of the iteration, over all ranks.
        """
        for prefix, key, loss in (("update", "loss", module.loss), ("replay", "replay_loss", module.replay_loss)):
            if loss.may_drop and values.get(f"{prefix}/tokens", 0):
                self._idle(
                    f"model.{key}",
                    values.get(f"{prefix}/cov_fraction", 0.0) == 0,
                    f"no token had a covariance between its lower and upper bound ({loss}). Over the batch the "
                    "covariance scales with the rewards, and is 0 where all advantages are equal: scale the bounds "
                    "with the rewards, or take it state by state (covariance: state)",
                )
        if "replay/used" in values and module.imitation_weight > 0:
            self._idle(
                "data.replay",
                values["replay/used"] == 0,
                f"nothing was replayed; the buffer holds {values['replay/size']:.0f} samples, and a group's mean "
                f"reward is {values['replay/p50']:g} (P50). Where samples are usable at all, the schedule waits for "
                "more of them: lower data.replay's capacity or its schedule's ready, raise max_age, or use Mix",
            )
        if getattr(module.trainer.datamodule, "tool_reward_weight", 0.0) > 0:
            self._idle(
                "CurriculumSchedule (tool_reward)",
                values.get("reward/tool", 0.0) == 0,
                "the tool reward was 0 in every episode: none used a tool, or data.reward.tool_scale is 0",
            )

    def filters(self, shares: Mapping[str, float]) -> None:
        """A filter that takes much out of the loss.

        Args:
            shares: of the episodes that each filter took out, the largest first
                (:func:`~spear_lightning.data.scoring.shares_filtered`).
        """
        name, share = next(iter(shares.items()), ("", 0.0))
        self.note(
            "data.filters",
            share > _MUCH,
            f"data.filters.{name} takes {share:.0%} of this iteration's episodes out of the loss. What is filtered is "
            "never punished, so a policy can drift into it: watch filter/* and rollout/success, and consider "
            f"data.filters.{name}: false",
        )

    def signal(self, found: Resampling, rollouts: TrainingRollouts) -> None:
        """Resampling that did not find enough groups with signal.

        Args:
            found: what it took.
            rollouts: what was wanted.
        """
        self.note(
            "data.rollouts.resample",
            found.signal < rollouts.tasks,
            f"after {found.rounds} further rounds with {found.groups} fresh tasks, only {found.signal} groups of "
            f"data.rollouts.tasks={rollouts.tasks} have episodes with different rewards, and the update learns from "
            f"these alone: raise data.rollouts.resample (now {rollouts.resample}), or give data.environment tasks that "
            "are sometimes solved (easier ones where rollout/success is near 0, harder ones where it is near 1)",
        )

    def _idle(self, name: str, idle: bool, why: str) -> None:
        self.note(name, idle, f"{name} has not acted for {_PATIENCE} iterations: {why}.", _PATIENCE)

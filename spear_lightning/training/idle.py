"""Says so when something that is configured to act never does."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

from spear_lightning.training.hooks import Learner

_PATIENCE = 20
"""Iterations after which a user should know."""


class IdleWatch:
    """Warns of each part that could have acted for 20 iterations on end and has not: once in such a spell."""

    def __init__(self) -> None:
        self._idle: dict[str, int] = {}

    def look_at(self, module: Learner, values: Mapping[str, float]) -> None:
        """Take note of an iteration.

        Args:
            module: that trains.
            values: its metrics of the iteration, over all ranks.
        """
        for prefix, key, loss in (("update", "loss", module.loss), ("replay", "replay_loss", module.replay_loss)):
            if loss.may_drop and values.get(f"{prefix}/tokens", 0):
                self._note(
                    f"model.{key}",
                    values.get(f"{prefix}/cov_fraction", 0.0) > 0,
                    f"no token had a covariance between its lower and upper bound ({loss}). Over the batch the "
                    "covariance scales with the rewards, and is 0 where all advantages are equal: scale the bounds "
                    "with the rewards, or take it state by state (covariance: state)",
                )
        if "replay/used" in values and module.imitation_weight > 0:
            self._note(
                "data.replay",
                values["replay/used"] > 0,
                f"nothing was replayed; the buffer holds {values['replay/size']:.0f} samples, and a group's mean "
                f"reward is {values['replay/p50']:g} (P50). Where samples are usable at all, the schedule waits for "
                "more of them: lower data.replay's capacity or its schedule's ready, raise max_age, or use Mix",
            )
        if getattr(module.trainer.datamodule, "tool_reward_weight", 0.0) > 0:
            self._note(
                "CurriculumSchedule (tool_reward)",
                values.get("reward/tool", 0.0) != 0,
                "the tool reward was 0 in every episode: none used a tool, or data.reward.tool_scale is 0",
            )

    def _note(self, key: str, acted: bool, why: str) -> None:
        self._idle[key] = 0 if acted else self._idle.get(key, 0) + 1
        if self._idle[key] == _PATIENCE:
            rank_zero_warn(f"{key} has not acted for {_PATIENCE} iterations: {why}.")


_MUCH = 0.3
"""Share of filtered episodes from which on a user should know."""


class FilterWarning:
    """Warns once, when a filter takes much out of the loss."""

    def __init__(self) -> None:
        self._given = False

    def look_at(self, shares: Mapping[str, float]) -> None:
        """Take note of an iteration.

        Args:
            shares: of the episodes that each filter took out, the largest first
                (:func:`~spear_lightning.data.scoring.shares_filtered`).
        """
        name, share = next(iter(shares.items()), ("", 0.0))
        if share > _MUCH and not self._given:
            self._given = True
            rank_zero_warn(
                f"data.filters.{name} takes {share:.0%} of this iteration's episodes out of the loss. What is filtered "
                "is never punished, so a policy can drift into it: watch filter/* and rollout/success, and consider "
                f"data.filters.{name}: false"
            )

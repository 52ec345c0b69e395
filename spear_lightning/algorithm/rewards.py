"""What an episode is paid, ``R = R_outcome + μ·R_tool + R_format``, and what its invalid turns pay (§1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from spear_lightning.utils.ranges import AtLeast0, in_range

ToolVariant = Literal["linear", "flat_when_correct"]


def tool_reward(calls: int, *, correct: bool, variant: ToolVariant = "linear") -> float:
    """The intrinsic reward for acting, ``R_tool = min(1, 0.1·n)``.

    Args:
        calls: n, turns that called a tool or acted on the environment.
        correct: whether the task was solved.
        variant: ``linear``, or ``flat_when_correct``: a solved episode gets 1 for any call at all, so that it gains
            nothing by more calls than it needed.

    Returns:
        In [0, 1].

    Raises:
        ValueError: unknown ``variant``.
    """
    if variant not in get_args(ToolVariant):
        raise ValueError(f"unknown tool reward variant {variant!r}: use one of {', '.join(get_args(ToolVariant))}")
    if correct and variant == "flat_when_correct":
        return float(calls > 0)
    return min(1.0, 0.1 * calls)


@dataclass(frozen=True)
class RewardParts:
    """A composed reward. A turn is worth R less its own penalty.

    Attributes:
        total: R, the sum of the three parts.
        outcome: R_outcome.
        tool: μ(t)·R_tool.
        format: R_format.
        penalties: what each turn pays for itself, not negative, float64 ``(turns,)``.
        step_rewards: the environment's own reward of each turn, R_outcome in the last one, float64 ``(turns,)``; tool
            reward and penalties are not in it.
    """

    total: float
    outcome: float
    tool: float
    format: float
    penalties: npt.NDArray[np.float64]
    step_rewards: npt.NDArray[np.float64]


@in_range
@dataclass(frozen=True)
class RewardComposer:
    """What an episode is paid for.

    Args:
        success: R_outcome of a solved task.
        failure: R_outcome of any other.
        score_scale: times the environment's own summed reward, added to R_outcome (partial credit); 0 as published.
        invalid_penalty: what a turn without the required form pays, and no other turn of its episode.
        tool_scale: scales R_tool. With ``success`` = 1 a tool reward of up to 1 rivals solving the task: use 0.1,
            the published ratio.
        tool_variant: see :func:`tool_reward`.
        format_reward: R_format, paid to an episode in which every turn has the required form.

    Raises:
        ValueError: a number is out of range, or ``success`` is not above ``failure``.
    """

    success: float = 10.0
    failure: float = 0.0
    score_scale: AtLeast0 = 0.0
    invalid_penalty: AtLeast0 = 0.1
    tool_scale: AtLeast0 = 1.0
    tool_variant: ToolVariant = "linear"
    format_reward: float = 0.0

    def __post_init__(self) -> None:
        if self.success <= self.failure:
            raise ValueError(
                f"RewardComposer.success = {self.success} must be above RewardComposer.failure = {self.failure}"
            )
        tool_reward(0, correct=False, variant=self.tool_variant)

    def compose(
        self, success: bool, score: float, tool_calls: int, invalid_turns: Sequence[bool], mu: float
    ) -> RewardParts:
        """The reward of one episode.

        Args:
            success: whether the task was solved.
            score: sum of the environment's own rewards.
            tool_calls: n of R_tool.
            invalid_turns: one per turn: it did not have the required form.
            mu: μ(t), the weight of R_tool in this iteration.
        """
        turns = len(invalid_turns)
        outcome = (self.success if success else self.failure) + self.score_scale * score
        tool = mu * self.tool_scale * tool_reward(tool_calls, correct=success, variant=self.tool_variant)
        form = self.format_reward if turns and not any(invalid_turns) else 0.0
        penalties = np.where(np.asarray(invalid_turns, dtype=bool), self.invalid_penalty, 0.0)
        step_rewards = np.zeros(turns)
        step_rewards[-1:] = outcome
        return RewardParts(outcome + tool + form, outcome, tool, form, penalties, step_rewards)

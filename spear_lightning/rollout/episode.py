"""What a rollout is made of: turns and episodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from spear_lightning.agents.base import Context
from spear_lightning.environments.base import Task


@dataclass(slots=True)
class Turn:
    """One response of the policy and what the environment made of it.

    Attributes:
        prompt_ids: int32. In ``stepwise`` context the whole prompt; in ``conversation`` only what was appended since
            the previous response (the first turn: the opening prompt).
        response_ids: generated token ids, int32 ``(tokens,)``, exactly as drawn.
        logps: behaviour log-probabilities, float32 ``(tokens,)``.
        entropies: policy entropy at each generated token in nats, float32 ``(tokens,)``.
        finish: ``"stop"`` or ``"length"`` (cut at the limit).
        observation: text the agent answered to.
        text: the response, decoded (for people and filters; never encoded again).
        action: what was sent to the environment; ``None`` for a void turn (nothing could be parsed).
        valid: the response had the required form (and, if so configured, an admissible action).
        tool_call: the turn used a tool (math), or acted on the environment (ALFWorld, WebShop).
        anchor: name of the state the turn started from (GiGPO).
        reward: the environment's reward of this step.
    """

    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    finish: Literal["stop", "length"]
    observation: str
    text: str
    action: str | None
    valid: bool
    tool_call: bool
    anchor: str
    reward: float = 0.0


@dataclass(slots=True)
class Episode:
    """One attempt at a task.

    Attributes:
        task: what was attempted.
        group: number of the task within the iteration, equal for the ``G`` episodes that attempted it, on any rank.
        index: number of the episode within its group.
        iteration: that it was played in.
        context: how rows are made of it.
        turns: in order.
        score: sum of the environment's rewards.
        success: whether the task was solved.
        answer: what the agent has answered, where the task asks for an answer; else empty.
        status: ``"finished"``; ``"truncated"`` (turn or length limit); ``"aborted"`` (environment failed: neither a
            success nor a failure, never trained on).
        reason: why it was aborted or truncated, else empty.
        weight_version: of the policy that played it.
    """

    task: Task
    group: int
    index: int
    iteration: int
    context: Context
    turns: list[Turn] = field(default_factory=list)
    score: float = 0.0
    success: bool = False
    answer: str = ""
    status: Literal["finished", "truncated", "aborted"] = "finished"
    reason: str = ""
    weight_version: int = 0

    @property
    def tool_calls(self) -> int:
        """Turns that used a tool or acted on the environment (``n`` in R_tool)."""
        return sum(turn.tool_call for turn in self.turns)

    @property
    def samples(self) -> int:
        """Training samples that it is made into: one a turn in ``stepwise`` context, else one."""
        return len(self.turns) if self.context == "stepwise" else 1

    @property
    def invalid(self) -> int:
        """Turns whose response did not have the required form."""
        return sum(not turn.valid for turn in self.turns)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens the policy generated."""
        return sum(len(turn.response_ids) for turn in self.turns)

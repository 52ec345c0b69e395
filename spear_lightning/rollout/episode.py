"""What a rollout is made of: turns, episodes, and the token rows that training sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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


@dataclass(slots=True)
class Row:
    """One sequence of tokens to train on; all arrays have shape ``(tokens,)``.

    Attributes:
        ids: token ids, int32.
        mask: true at generated tokens that carry a gradient.
        logps: behaviour log-probabilities, float32; 0 at tokens that were not generated.
        advantages: float32; 0 at tokens that were not generated.
        turns: number of the turn that generated the token, int16; -1 at tokens that were not generated.
        weights: factor of each token's loss (truncated importance sampling), float32; ``None`` is 1 everywhere.
    """

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    logps: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    turns: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def advantage(self) -> float:
        """Mean advantage of the tokens in the loss; 0 if there are none."""
        return float(self.advantages[self.mask].mean()) if self.mask.any() else 0.0

    def with_advantage(self, advantage: float) -> Row:
        """The same tokens with one advantage on all that were generated."""
        return replace(self, advantages=np.where(self.turns >= 0, np.float32(advantage), np.float32(0)))


def rows_of(
    episode: Episode, advantages: npt.NDArray[np.floating], keep: npt.NDArray[np.bool_]
) -> list[tuple[int, Row]]:
    """The training rows of an episode.

    Args:
        episode: as played.
        advantages: one per turn.
        keep: one per turn; false takes the turn out of the loss (its tokens stay in the context).

    Returns:
        ``(first turn, row)`` pairs: one per turn with at least one generated token in ``stepwise`` context, one for
        the whole episode in ``conversation`` context.
    """
    numbers = range(len(episode.turns))
    if episode.context == "stepwise":
        return [
            (number, _row(episode.turns, [number], advantages, keep))
            for number in numbers
            if len(episode.turns[number].response_ids)
        ]
    return [(0, _row(episode.turns, numbers, advantages, keep))] if episode.turns else []


def _row(
    turns: Sequence[Turn],
    numbers: Sequence[int],
    advantages: npt.NDArray[np.floating],
    keep: npt.NDArray[np.bool_],
) -> Row:
    """The turns of these numbers, end to end."""
    tokens = sum(len(turns[number].prompt_ids) + len(turns[number].response_ids) for number in numbers)
    row = Row(
        ids=np.empty(tokens, np.int32),
        mask=np.zeros(tokens, bool),
        logps=np.zeros(tokens, np.float32),
        advantages=np.zeros(tokens, np.float32),
        turns=np.full(tokens, -1, np.int16),
    )
    end = 0
    for number in numbers:
        turn = turns[number]
        start = end + len(turn.prompt_ids)
        row.ids[end:start] = turn.prompt_ids
        end = start + len(turn.response_ids)
        row.ids[start:end] = turn.response_ids
        row.mask[start:end] = keep[number]
        row.logps[start:end] = turn.logps
        row.advantages[start:end] = advantages[number]
        row.turns[start:end] = number
    return row

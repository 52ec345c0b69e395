"""Episodes made by hand, for tests of what happens after they were played."""

from __future__ import annotations

import numpy as np

from spear_lightning.agents.base import Context
from spear_lightning.environments.base import Task
from spear_lightning.rollout.episode import Episode, Turn


def make_turn(tokens: int = 3, *, prompt: int = 4, start: int = 10, **changes: object) -> Turn:
    values: dict[str, object] = {
        "prompt_ids": np.arange(1, prompt + 1, dtype=np.int32),
        "response_ids": np.arange(start, start + tokens, dtype=np.int32),
        "logps": np.full(tokens, -0.5, np.float32),
        "entropies": np.full(tokens, 0.7, np.float32),
        "finish": "stop",
        "observation": "a room",
        "text": "<action> look </action>",
        "action": "look",
        "valid": True,
        "tool_call": True,
        "anchor": "a room",
    }
    return Turn(**{**values, **changes})  # type: ignore[arg-type]


def make_episode(
    group: int = 0,
    index: int = 0,
    *,
    success: bool = False,
    turns: int = 2,
    context: Context = "conversation",
    **changes: object,
) -> Episode:
    values: dict[str, object] = {
        "task": Task(id=f"game-{group}", task_type="pick"),
        "group": group,
        "index": index,
        "iteration": 0,
        "context": context,
        "turns": [make_turn(start=10 + number) for number in range(turns)],
        "success": success,
        "score": float(success),
    }
    return Episode(**{**values, **changes})  # type: ignore[arg-type]

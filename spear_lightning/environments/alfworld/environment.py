"""ALFWorld as a Gymnasium environment whose observations and actions are text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import override

from spear_lightning.environments.alfworld.engine import GameCache, make_engine
from spear_lightning.environments.alfworld.games import GAME_FILE
from spear_lightning.environments.text import TextEnv

_TASK_MARK = "Your task is to:"


class ALFWorldEnv(TextEnv):
    """One household game at a time, on the real ALFWorld engine.

    ``info`` carries ``admissible_actions`` (list of str, without ``help``), ``won`` (bool), ``anchor`` (the
    observation, which names the state in GiGPO's step groups), ``task`` (the instruction) and ``task_type``. The reward
    is 1 for the step that wins and 0 otherwise. What the engine does not understand, text or not, is answered by
    ``Nothing happens.``.

    Args:
        root: data folder in ALFWorld's layout; a task's id is a game's folder relative to it.
        cache: loaded games, shared by the environments of a process.
        max_steps: steps after which an episode is truncated.
    """

    def __init__(self, root: Path, cache: GameCache, max_steps: int = 50) -> None:
        super().__init__(max_steps)
        self._root = root
        self._engine: Any = make_engine(cache)
        self._instruction = ""

    @override
    def _begin(self, task: str) -> str:
        if task != self._task:
            self._task = ""  # a game that cannot be loaded leaves none
            self._engine.load(str(self._root / task / GAME_FILE))
        self._state = self._engine.reset()
        self._instruction = self._state.feedback.partition(_TASK_MARK)[2].strip()
        return str(self._state.feedback)

    @override
    def _act(self, action: str) -> tuple[str, float, bool]:
        self._state, score, won = self._engine.step(action)
        return str(self._state.feedback), float(score), bool(won)

    @override
    def _info(self) -> dict[str, Any]:
        return {
            "admissible_actions": [command for command in self._state["admissible_commands"] if command != "help"],
            "won": bool(self._state["won"]),
            "anchor": self._state.feedback,
            "task": self._instruction,
            "task_type": Path(self._task).parent.name.partition("-")[0],
        }

    @override
    def close(self) -> None:
        self._engine.close()  # gives the planner back to the cache

"""ALFWorld as a Gymnasium environment whose observations and actions are text."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from spear_lightning.environments.alfworld.engine import GameCache, make_engine
from spear_lightning.environments.alfworld.games import GAME_FILE

_TASK_MARK = "Your task is to:"
_LONGEST = 100_000  # characters; a bound that Gymnasium's text space asks for


class ALFWorldEnv(gymnasium.Env[str, str]):
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
        self.observation_space = Text(_LONGEST, charset=string.printable)
        self.action_space = Text(_LONGEST, min_length=0, charset=string.printable)
        self._root = root
        self._max_steps = max_steps
        self._engine: Any = make_engine(cache)
        self._loaded = ""
        self._task = ""
        self._steps = 0
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a game.

        Args:
            seed: accepted for Gymnasium's sake; a game has no chance in it.
            options: ``{"task": id}``; without it, the last game again.

        Returns:
            The first observation and ``info``.

        Raises:
            ValueError: no game of that id, or a game that cannot be read; the message names the file.
        """
        super().reset(seed=seed)
        task = str((options or {}).get("task", self._loaded))
        if not task:
            raise ValueError('ALFWorldEnv.reset needs options={"task": <id>}, an id of ALFWorld.tasks(split)')
        if task != self._loaded:
            self._loaded = ""
            self._engine.load(str(self._root / task / GAME_FILE))
            self._loaded = task
        state = self._engine.reset()
        self._task = state.feedback.partition(_TASK_MARK)[2].strip()
        self._steps = 0
        self._over = False
        return state.feedback, self._info(state)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out a command.

        Args:
            action: the command, as a model wrote it.

        Returns:
            Observation, reward, whether the game is won, whether the step limit cut it, ``info``.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over or was never started.
        """
        if self._over:
            raise ResetNeeded("the episode is over: call reset first")
        state, score, won = self._engine.step(action if isinstance(action, str) else "")
        self._steps += 1
        truncated = not won and self._steps >= self._max_steps
        self._over = won or truncated
        return state.feedback, float(score), bool(won), truncated, self._info(state)

    def _info(self, state: Any) -> dict[str, Any]:
        return {
            "admissible_actions": [command for command in state["admissible_commands"] if command != "help"],
            "won": bool(state["won"]),
            "anchor": state.feedback,
            "task": self._task,
            "task_type": Path(self._loaded).parent.name.partition("-")[0],
        }

    def close(self) -> None:
        """Give the engine back to the cache."""
        self._engine.close()

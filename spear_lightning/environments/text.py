"""An environment of text in which one task at a time is played, cut after so many steps."""

from __future__ import annotations

import string
from abc import abstractmethod
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text
from typing_extensions import override

_LONGEST = 100_000  # characters; a bound that Gymnasium's text space asks for


class TextEnv(gymnasium.Env[str, str]):
    """Gymnasium's part of a text environment; a subclass begins tasks and carries out actions.

    Args:
        max_steps: steps after which an episode is truncated.
    """

    def __init__(self, max_steps: int) -> None:
        self.observation_space = Text(_LONGEST, charset=string.printable)
        self.action_space = Text(_LONGEST, min_length=0, charset=string.printable)
        self._max_steps = max_steps
        self._task = ""
        self._steps, self._over = 0, True

    @override
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a task.

        Args:
            seed: accepted for Gymnasium's sake; a task has no chance in it.
            options: ``{"task": id}``; without it, the last task again.

        Returns:
            The first observation and ``info``.

        Raises:
            ValueError: no task of that id, or one that cannot be read; the message names it.
        """
        super().reset(seed=seed)
        task = str((options or {}).get("task", self._task))
        if not task:
            raise ValueError(
                f'reset needs options={{"task": <id>}}, an id of {type(self).__name__.removesuffix("Env")}.tasks(split)'
            )
        text = self._begin(task)
        self._task, self._steps, self._over = task, 0, False
        return text, self._info()

    @override
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out an action.

        Args:
            action: as a model wrote it.

        Returns:
            Observation, reward, whether the task is over, whether the step limit cut it, ``info``.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over or was never started.
        """
        if self._over:
            raise ResetNeeded("the episode is over: call reset first")
        text, reward, terminated = self._act(action if isinstance(action, str) else "")
        self._steps += 1
        truncated = not terminated and self._steps >= self._max_steps
        self._over = terminated or truncated
        return text, reward, terminated, truncated, self._info()

    @abstractmethod
    def _begin(self, task: str) -> str:
        """Start the task of this id; its first observation."""

    @abstractmethod
    def _act(self, action: str) -> tuple[str, float, bool]:
        """Observation, reward, and whether the task is over."""

    @abstractmethod
    def _info(self) -> dict[str, Any]:
        """What is told beside the observation."""

"""Any Gymnasium environment with text observations and actions, named in the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import gymnasium

from spear_lightning.environments.base import SEEDS_PER_SPLIT, Split, Task, TaskSuite, first_seed

_SPLITS: tuple[Split, ...] = get_args(Split)


class GymnasiumSuite(TaskSuite):
    """A user's own environment; a task is a seed.

    The environment is reset with ``reset(seed=seed, options={"task": id})``. Its observations and actions are text;
    ``info`` may carry ``admissible_actions``, ``won``, ``anchor`` and ``task`` (see :class:`TaskSuite`).

    Args:
        env: import path of a class or function that makes the environment (``my_package.games.Maze``), or a
            registered Gymnasium id (``Maze-v0``, ``my_package:Maze-v0``).
        env_args: keyword arguments to make it with.
        tasks: number of tasks in each split. The seeds of the splits are disjoint (``train`` counts from 0,
            ``validation`` from 100 000 000, ``test`` from 200 000 000), so that the held-out tasks stay the same when
            the number of training tasks changes.

    Raises:
        ValueError: ``tasks`` names an unknown split or an impossible number.

    Example::

        environment:
          class_path: GymnasiumSuite
          init_args: {env: my_package.games.Maze, env_args: {size: 5}, tasks: {train: 400, validation: 64}}
    """

    def __init__(
        self, env: str, env_args: Mapping[str, Any] | None = None, tasks: Mapping[str, int] | None = None
    ) -> None:
        self.env = env
        self.env_args = dict(env_args or {})
        self.counts = dict(tasks or {"train": 256, "validation": 64, "test": 64})
        for split, count in self.counts.items():
            if split not in _SPLITS:
                raise ValueError(f"tasks: unknown split {split!r}; the splits are {', '.join(_SPLITS)}")
            if not 0 <= count <= SEEDS_PER_SPLIT:
                raise ValueError(f"tasks.{split} must be between 0 and {SEEDS_PER_SPLIT}, not {count}")

    def tasks(self, split: Split) -> Sequence[Task]:
        """One task per seed.

        Raises:
            ValueError: no task is configured for this split.
        """
        count = self.counts.get(split, 0)
        if count == 0:
            raise ValueError(f"{self.env} has no {split} tasks: set environment.init_args.tasks.{split}")
        return [Task(id=f"{split}-{number}", seed=first_seed(split) + number) for number in range(count)]

    def make(self) -> gymnasium.Env[Any, Any]:
        """A fresh environment.

        Raises:
            ValueError: ``env`` cannot be found, or does not make a Gymnasium environment.
        """
        module, _, name = self.env.rpartition(".")
        if not module or ":" in self.env:
            return self._make_registered()
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"env: cannot import {self.env!r}: {error}") from error
        environment = make(**self.env_args)
        if not isinstance(environment, gymnasium.Env):
            raise ValueError(f"env: {self.env!r} makes a {type(environment).__name__}, not a gymnasium.Env")
        return environment

    def _make_registered(self) -> gymnasium.Env[Any, Any]:
        try:
            # The checker complains of text spaces that do not list every character.
            environment: gymnasium.Env[Any, Any] = gymnasium.make(self.env, disable_env_checker=True, **self.env_args)
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(
                f"env: {self.env!r} is neither an import path (package.module.Class) nor a registered id: {error}"
            ) from error
        return environment

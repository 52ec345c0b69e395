"""What an environment is here: a Gymnasium environment whose observations and actions are text.

A :class:`TaskSuite` names the tasks of each split and makes environments that can play them. It is a small picklable
description: the pool (:mod:`spear_lightning.environments.pool`) sends it to its worker processes, which make and hold
the environments, so that no engine is ever loaded in the training process.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import gymnasium

from spear_lightning.utils.atomic import user_cache

_T = TypeVar("_T")
Split = Literal["train", "validation", "test"]
SEEDS_PER_SPLIT = 100_000_000


def first_seed(split: Split) -> int:
    """Where the seeds of a split begin: far enough apart that held-out tasks stay when training tasks are added."""
    return get_args(Split).index(split) * SEEDS_PER_SPLIT


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to be done: a game, a shopping goal, a problem.

    Attributes:
        id: unique name within its suite; passed to the environment as ``reset(options={"task": id})``.
        task_type: what results are broken down by (for example ``pick_and_place_simple``), may be empty.
        seed: passed to the environment as ``reset(seed=seed)``.
    """

    id: str
    task_type: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment answered to a reset or a step.

    Attributes:
        text: the observation the agent reads.
        admissible: actions the engine would accept now; empty when the environment does not tell.
        reward: the environment's own reward of the step (0 after a reset).
        won: whether the task has been solved.
        terminated: the task is over (solved or failed for good).
        truncated: the environment cut the episode (its own step limit).
        anchor: name of the state, equal for equal states (GiGPO's step groups); the text if the environment tells none.
        task: the task's instruction, where the environment separates it from the observation; else empty.
        answer: what the agent has answered, where a task asks for an answer (for majority votes); else empty.
        aborted: why the episode cannot go on (worker died, time-out, the environment raised), else ``None``. An aborted
            episode is neither a success nor a failure.
    """

    text: str
    admissible: tuple[str, ...] = ()
    reward: float = 0.0
    won: bool = False
    terminated: bool = False
    truncated: bool = False
    anchor: str = ""
    task: str = ""
    answer: str = ""
    aborted: str | None = None

    @property
    def done(self) -> bool:
        """Whether no further step can follow."""
        return self.terminated or self.truncated or self.aborted is not None


class Settings:
    """Pickled as its settings: what its cached properties hold is made anew where it is needed."""

    def __getstate__(self) -> dict[str, Any]:
        cached = {
            name for cls in type(self).__mro__ for name, kind in vars(cls).items() if isinstance(kind, cached_property)
        }
        return {name: value for name, value in vars(self).items() if name not in cached}


class TaskSuite(Settings, ABC):
    """The tasks of an environment family, by split, and a maker of environments that play them.

    Subclasses must be picklable and cheap to construct: no engine, no large data in ``__init__``.

    The environments that :meth:`make` returns follow the Gymnasium API with text: ``reset(seed=, options={"task": id})
    -> (text, info)``, ``step(action_text) -> (text, reward, terminated, truncated, info)``. ``info`` may carry
    ``admissible_actions`` (list of str), ``won`` (bool), ``anchor`` (str), ``task`` (str, the instruction) and
    ``answer`` (str, what the agent has answered).
    """

    def prepare(self) -> None:
        """Do once per machine what must exist before tasks can be listed (generate games, check data folders).

        Raises:
            ValueError: the configuration or the data cannot be used; the message names the key or file and the fix.
        """

    @abstractmethod
    def tasks(self, split: Split) -> Sequence[Task]:
        """The tasks of ``split`` in a fixed order; never empty.

        Raises:
            ValueError: there is no task in this split; the message names the folder or setting and the fix.
        """

    @abstractmethod
    def make(self) -> gymnasium.Env[Any, Any]:
        """A fresh environment able to play any task of any split. Called inside a worker process."""


def require(user: str, extra: str, packages: Mapping[str, str]) -> None:
    """See to it that packages are installed.

    Args:
        user: what needs them, for the message.
        extra: of this package, that installs them.
        packages: name of the package by that of its module.

    Raises:
        ValueError: one is not; names the first.
    """
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"{user} needs the Python package {missing[0]}, which is not installed: "
            f"pip install 'spear-lightning[{extra}]'"
        )


def show_progress(made: Iterable[_T], count: int, label: str) -> Iterable[_T]:
    """What is made, as it is taken, with a progress bar on a terminal and one line in a log file.

    Args:
        made: one after the other.
        count: how many there will be.
        label: what they are (``TextWorld train games``).
    """
    if not sys.stderr.isatty():
        print(f"making {count} {label}, once", file=sys.stderr, flush=True)
        return made
    from rich.console import Console
    from rich.progress import track

    return track(made, label, count, console=Console(stderr=True), transient=True)


def cache_folder(cache_dir: str | None) -> Path:
    """The folder that was asked for, or the user's."""
    return Path(cache_dir).expanduser() if cache_dir else user_cache()

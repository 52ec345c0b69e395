"""Several environments in one run, each with its share of the training tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

import gymnasium

from spear_lightning.environments.base import Split, Task, TaskSuite


class Mixture(TaskSuite):
    """Tasks of several suites; results are reported for each of them and for its task types.

    A pass over the training tasks has the shares that ``weights`` ask for: where a suite has too few tasks for its
    share they are played several times in a pass. Held-out tasks are played once each, whatever the weights.

    Args:
        environments: suites by a name of your own, without ``/`` and ``#``.
        weights: share of each in the training tasks, in any unit; equal shares by default.

    Raises:
        ValueError: no environment, a name that cannot be one, or weights that do not fit the names.

    Example::

        environment:
          class_path: Mixture
          init_args:
            environments:
              house: {class_path: ALFWorld}
              shop: {class_path: WebShop}
            weights: {house: 2, shop: 1}
    """

    def __init__(self, environments: dict[str, TaskSuite], weights: dict[str, float] | None = None) -> None:
        if not environments:
            raise ValueError("Mixture.environments is empty: name at least one environment")
        wrong = [name for name in environments if not name or "/" in name or "#" in name]
        if wrong:
            raise ValueError(f"Mixture.environments: {wrong[0]!r} cannot be a name: it must be a word without / and #")
        self.environments = dict(environments)
        self.weights = dict(weights) if weights is not None else dict.fromkeys(environments, 1.0)
        if self.weights.keys() != self.environments.keys() or min(self.weights.values()) <= 0:
            raise ValueError(
                f"Mixture.weights must give each of {', '.join(self.environments)} a number above 0, not {self.weights}"
            )

    def prepare(self) -> None:
        """Prepare each environment."""
        for suite in self.environments.values():
            suite.prepare()

    def tasks(self, split: Split) -> Sequence[Task]:
        """The tasks of all suites, taking turns; ids and types begin with the name of the suite.

        Raises:
            ValueError: a suite has no task in this split; names it.
        """
        lists = {name: self._named(name, split) for name in self.environments}
        if split == "train":
            lists = self._in_shares(lists)
        turns = zip_longest(*lists.values())
        return [task for task in chain.from_iterable(turns) if task is not None]

    def make(self) -> gymnasium.Env[Any, Any]:
        """An environment that becomes that of the task it is reset to."""
        return MixtureEnvironment(self.environments)

    def _named(self, name: str, split: Split) -> list[Task]:
        try:
            tasks = self.environments[name].tasks(split)
        except ValueError as error:
            raise ValueError(f"environment {name!r} of the mixture: {error}") from error
        return [
            replace(task, id=f"{name}/{task.id}", task_type=f"{name}/{task.task_type}".rstrip("/")) for task in tasks
        ]

    def _in_shares(self, lists: Mapping[str, list[Task]]) -> dict[str, list[Task]]:
        """As many of each as its weight says, none left out; ``name#1/id`` is a task for the second time."""
        unit = max(len(tasks) / self.weights[name] for name, tasks in lists.items())
        shared = {}
        for name, tasks in lists.items():
            wanted = max(len(tasks), round(unit * self.weights[name]))
            rounds = (divmod(number, len(tasks)) for number in range(wanted))
            shared[name] = [
                replace(tasks[index], id=tasks[index].id.replace(name, f"{name}#{number}", 1))
                if number
                else tasks[index]
                for number, index in rounds
            ]
        return shared


class MixtureEnvironment(gymnasium.Env[str, str]):
    """One environment of each suite, made when it is first needed, of which one is played at a time.

    Args:
        suites: by name.
    """

    def __init__(self, suites: Mapping[str, TaskSuite]) -> None:
        self._suites = suites
        self._made: dict[str, gymnasium.Env[Any, Any]] = {}
        self._current: gymnasium.Env[Any, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin a task: ``options={"task": "name/id"}``."""
        head, _, task = str((options or {})["task"]).partition("/")
        name = head.partition("#")[0]
        if name not in self._made:
            self._made[name] = self._suites[name].make()
        self._current = self._made[name]
        return self._current.reset(seed=seed, options={**(options or {}), "task": task})

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act in the environment of the current task."""
        assert self._current is not None, "reset() comes first"
        text, reward, terminated, truncated, info = self._current.step(action)
        return text, float(reward), terminated, truncated, info

    def close(self) -> None:
        """Close all that were made."""
        for environment in self._made.values():
            environment.close()
        self._made, self._current = {}, None


def with_families(kinds: Sequence[str]) -> list[str]:
    """Task types, and the environments of a mixture that they belong to, in order.

    >>> with_families(["house/cool", "house/heat", "shop"])
    ['house', 'house/cool', 'house/heat', 'shop']
    """
    return sorted({kind for kind in kinds if kind} | {kind.partition("/")[0] for kind in kinds if "/" in kind})


def belongs(kind: str, family: str) -> bool:
    """Whether a task type is ``family`` or one of its types."""
    return kind == family or kind.startswith(f"{family}/")

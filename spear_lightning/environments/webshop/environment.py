"""WebShop as a Gymnasium environment whose observations and actions are text."""

from __future__ import annotations

import string
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from spear_lightning.environments.webshop.catalogue import Catalogue
from spear_lightning.environments.webshop.goals import GOAL_KINDS, GoalKind
from spear_lightning.environments.webshop.pages import PER_PAGE
from spear_lightning.environments.webshop.session import Session

_LONGEST = 100_000  # characters; a bound that Gymnasium's text space asks for


def task_id(kind: GoalKind, number: int) -> str:
    """The task of a goal: ``human-17``."""
    return f"{kind}-{number}"


class WebShopEnv(gymnasium.Env[str, str]):
    """One shopping goal at a time.

    ``info`` carries ``admissible_actions`` (list of str; ``search[<your query>]`` stands for every search), ``won``
    (bool: something was bought and its reward is 1), ``anchor`` (the page, without the instruction), ``task`` (the
    instruction), ``task_type`` (department of the product that the goal was written about) and ``task_score`` (the
    reward of the purchase, 0 before). The reward of the step that buys is that score, of any other step 0. What cannot
    be understood or done leaves the page as it is.

    Args:
        catalogue: of the shop.
        max_steps: steps after which an episode is truncated.
        per_page: hits on a page of results.
    """

    def __init__(self, catalogue: Catalogue, max_steps: int = 15, per_page: int = PER_PAGE) -> None:
        self.observation_space = Text(_LONGEST, charset=string.printable)
        self.action_space = Text(_LONGEST, min_length=0, charset=string.printable)
        self._catalogue = catalogue
        self._max_steps, self._per_page = max_steps, per_page
        self._session: Session | None = None
        self._task = ""
        self._instruction = ""
        self._department = ""
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Enter the shop.

        Args:
            seed: accepted for Gymnasium's sake; a goal has no chance in it.
            options: ``{"task": id}``; without it, the last goal again.

        Returns:
            The instruction and the first page, and ``info``.

        Raises:
            ValueError: no goal of that id.
        """
        super().reset(seed=seed)
        task = str((options or {}).get("task", self._task))
        kind, number = self._parse(task)
        goal = self._catalogue.goal(kind, number)
        self._task = task
        self._instruction = goal.instruction
        self._department = self._catalogue.department(kind, number)
        self._session = Session(self._catalogue, goal, self._per_page)
        self._steps = 0
        return f"Instruction: {self._instruction}\n{self._session.page.text}", self._info(self._session)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Search or click.

        Args:
            action: ``search[words]`` or ``click[label]``, as a model wrote it.

        Returns:
            The page, the reward, whether something was bought, whether the step limit cut the episode, ``info``.

        Raises:
            gymnasium.error.ResetNeeded: the episode is over or was never started.
        """
        session = self._session
        if session is None or session.purchase is not None or self._steps >= self._max_steps:
            raise ResetNeeded("the episode is over: call reset first")
        session.act(action)
        self._steps += 1
        bought = session.purchase is not None
        truncated = not bought and self._steps >= self._max_steps
        info = self._info(session)
        return session.page.text, info["task_score"], bought, truncated, info

    def _parse(self, task: str) -> tuple[GoalKind, int]:
        if not task:
            raise ValueError('WebShopEnv.reset needs options={"task": <id>}, an id of WebShop.tasks(split)')
        name, _, number = task.rpartition("-")
        for kind in GOAL_KINDS:
            if name == kind and number.isdecimal() and int(number) < self._catalogue.goals(kind):
                return kind, int(number)
        counts = ", ".join(f"{self._catalogue.goals(kind)} {kind}" for kind in GOAL_KINDS)
        raise ValueError(f"WebShop has no goal {task[:100]!r}: ids are <kind>-<number>, and there are {counts} goals")

    def _info(self, session: Session) -> dict[str, Any]:
        score = session.purchase.total if session.purchase else 0.0
        return {
            "admissible_actions": session.page.admissible,
            "won": score == 1.0,
            "anchor": session.page.text,
            "task": self._instruction,
            "task_type": self._department,
            "task_score": score,
        }

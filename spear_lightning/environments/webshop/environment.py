"""WebShop as a Gymnasium environment whose observations and actions are text."""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from spear_lightning.environments.text import TextEnv
from spear_lightning.environments.webshop.catalogue import Catalogue
from spear_lightning.environments.webshop.goals import GOAL_KINDS, GoalKind
from spear_lightning.environments.webshop.pages import PER_PAGE
from spear_lightning.environments.webshop.session import Session


def task_id(kind: GoalKind, number: int) -> str:
    """The task of a goal: ``human-17``."""
    return f"{kind}-{number}"


class WebShopEnv(TextEnv):
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
        super().__init__(max_steps)
        self._catalogue, self._per_page = catalogue, per_page
        self._instruction = self._department = ""

    @override
    def _begin(self, task: str) -> str:
        kind, number = self._parse(task)
        goal = self._catalogue.goal(kind, number)
        self._instruction = goal.instruction
        self._department = self._catalogue.department(kind, number)
        self._session = Session(self._catalogue, goal, self._per_page)
        return f"Instruction: {self._instruction}\n{self._session.page.text}"

    @override
    def _act(self, action: str) -> tuple[str, float, bool]:
        self._session.act(action)
        return self._session.page.text, self._score, self._session.purchase is not None

    @property
    def _score(self) -> float:
        return self._session.purchase.total if self._session.purchase else 0.0

    def _parse(self, task: str) -> tuple[GoalKind, int]:
        name, _, number = task.rpartition("-")
        for kind in GOAL_KINDS:
            if name == kind and number.isdecimal() and int(number) < self._catalogue.goals(kind):
                return kind, int(number)
        counts = ", ".join(f"{self._catalogue.goals(kind)} {kind}" for kind in GOAL_KINDS)
        raise ValueError(f"WebShop has no goal {task[:100]!r}: ids are <kind>-<number>, and there are {counts} goals")

    @override
    def _info(self) -> dict[str, Any]:
        session, score = self._session, self._score
        return {
            "admissible_actions": session.page.admissible,
            "won": score == 1.0,
            "anchor": session.page.text,
            "task": self._instruction,
            "task_type": self._department,
            "task_score": score,
        }

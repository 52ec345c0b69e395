"""What a scripted agent that gives demonstrations is, and how far it strays from the straight way."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from spear_lightning.utils.ranges import in_range

Motive = Literal["purpose", "stray", "invalid"]
"""Why a move was made: it served the goal; it strayed; or it was meant to be refused by the engine."""


_Chance = Annotated[float, Ge(0), Lt(1)]


@in_range
@dataclass(frozen=True)
class DemonstrationNoise:
    """How far demonstrations stray from the shortest search, so that a learner sees how to come back.

    Attributes:
        detour: chance that a walk leads to a random receptacle in place of the intended one.
        waste: chance of a move that changes nothing of use (look around, examine, check what is carried, close a door).
        mistake: chance of taking a wrong object that lies in reach (it is put back next).
        invalid: chance of an action that the engine refuses (it answers "Nothing happens.").
        shuffle: search unseen receptacles in random order; otherwise in the order in which they were listed.

    Raises:
        ValueError: a chance is out of range, or they sum to 1 or more.
    """

    detour: _Chance = 0.0
    waste: _Chance = 0.0
    mistake: _Chance = 0.0
    invalid: _Chance = 0.0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.detour + self.waste + self.mistake + self.invalid >= 1:
            raise ValueError(f"the chances of {self} must sum to less than 1")


class Expert(ABC):
    """A scripted agent that reads what a language model would read, and shows how it is done.

    Args:
        seed: of all its choices.
        noise: how demonstrations stray; by default not at all.

    Attributes:
        phrases: set phrases of its world, each of which becomes one token of a policy that learns from it.
        names: whether things of its world are called "desk 3", which then is one token too.
        motive: why the latest action was chosen.
    """

    phrases: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[bool] = True

    def __init__(self, seed: int, noise: DemonstrationNoise = DemonstrationNoise()) -> None:
        self._random, self._noise = random.Random(seed), noise
        self.motive: Motive = "purpose"

    @abstractmethod
    def reset(self, task: str, observation: str) -> None:
        """Start an episode.

        Args:
            task: the instruction.
            observation: the first one.

        Raises:
            ValueError: the instruction or the observation cannot be read.
        """

    @abstractmethod
    def act(self, observation: str = "") -> str:
        """Read what the previous action brought about and choose the next one.

        Args:
            observation: answer to the previous action; the first observation, or nothing, at the first call.
        """

    @abstractmethod
    def overrule(self, action: str) -> None:
        """Not the move that :meth:`act` chose was made, but this one; the next observation answers it."""

    def _choose(self) -> str:
        """The next action: one that serves the goal, or by chance, where there is one, one that strays."""
        draw, noise = self._random.random(), self._noise
        self.motive = "purpose"
        ways: tuple[tuple[float, Motive, Callable[[], list[str]]], ...] = (
            (noise.detour, "stray", self._detours),
            (noise.waste, "stray", self._wasted_moves),
            (noise.mistake, "stray", self._mistakes),
            (noise.invalid, "invalid", self._invalid_actions),
        )
        for chance, motive, options in ways:
            if draw < chance:
                if actions := options():
                    self.motive = motive
                    return self._random.choice(actions)
                break
            draw -= chance
        return self._advance()

    @abstractmethod
    def _advance(self) -> str:
        """The next action that serves the goal."""

    @abstractmethod
    def _detours(self) -> list[str]:
        """Walks to somewhere else."""

    @abstractmethod
    def _wasted_moves(self) -> list[str]:
        """Moves that change nothing."""

    @abstractmethod
    def _mistakes(self) -> list[str]:
        """Moves that have to be taken back."""

    @abstractmethod
    def _invalid_actions(self) -> list[str]:
        """Moves that the engine refuses."""

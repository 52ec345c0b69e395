"""What a scripted agent that gives demonstrations is, and how far it strays from the straight way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

Motive = Literal["purpose", "stray", "fumble"]
"""Why a move was made: it served the goal; it strayed; or it was meant to be refused by the engine."""


@dataclass(frozen=True)
class Wandering:
    """How far demonstrations stray from the shortest search, so that a learner sees how to come back.

    Attributes:
        detour: chance that a walk leads to a random receptacle in place of the intended one.
        waste: chance of a move that changes nothing of use (look around, examine, check what is carried, close a door).
        blunder: chance of taking a wrong object that lies in reach (it is put back next).
        fumble: chance of an action that the engine refuses (it answers "Nothing happens.").
        shuffle: search unseen receptacles in random order; otherwise in the order in which they were listed.
    """

    detour: float = 0.0
    waste: float = 0.0
    blunder: float = 0.0
    fumble: float = 0.0
    shuffle: bool = True

    def __post_init__(self) -> None:
        chances = {name: getattr(self, name) for name in ("detour", "waste", "blunder", "fumble")}
        for name, chance in chances.items():
            if not 0 <= chance < 1:
                raise ValueError(f"wandering.{name} must be in [0, 1), got {chance}.")
        if sum(chances.values()) >= 1:
            raise ValueError(f"wandering: the chances {chances} must sum to less than 1.")


class Expert(ABC):
    """A scripted agent that reads what a language model would read, and shows how it is done.

    Args:
        seed: of all its choices.
        wandering: how demonstrations stray; by default not at all.

    Attributes:
        phrases: set phrases of its world, each of which becomes one token of a policy that learns from it.
        names: whether things of its world are called "desk 3", which then is one token too.
        motive: why the latest action was chosen.
    """

    phrases: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[bool] = True
    motive: Motive

    @abstractmethod
    def __init__(self, seed: int, wandering: Wandering = Wandering()) -> None: ...

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

"""A scripted household agent that sees what a language model would see: the text, and nothing else.

It visits receptacles until it reads the object it was asked for, takes it, treats it (clean, heat, cool, light) and
puts it where it belongs. Planner walkthroughs are shorter, but they walk straight to objects nobody has seen yet; a
policy that clones them learns to guess. This expert has to search, so what it does can be learned from what it read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import override

from spear_lightning.environments.expert import Expert
from spear_lightning.utils.package_data import read_yaml

ALFWORLD_PHRASES: tuple[str, ...] = tuple(read_yaml(__name__, "phrases.yaml"))
"""Set phrases of the ALFWorld engine; each becomes one token (where it is preceded by a space)."""

Treatment = Literal["", "clean", "heat", "cool", "light"]

_APPLIANCE = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
_ADJECTIVE = {"clean": "clean", "hot": "heat", "cool": "cool"}
_THING = re.compile(r"\ban? ([a-z]+ \d+)")
_GOALS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"(?:look at|examine) (?:the )?(?P<object>\w+) (?:under|with) the (?P<target>\w+)"), 1),
    (re.compile(r"put two (?P<object>\w+) in (?P<target>\w+)"), 2),
    (re.compile(r"find two (?P<object>\w+) and put them in (?P<target>\w+)"), 2),
    (re.compile(r"(?P<verb>clean|heat|cool) some (?P<object>\w+) and put it in (?P<target>\w+)"), 1),
    (re.compile(r"put an? (?P<state>clean|hot|cool) (?P<object>\w+) in (?P<target>\w+)"), 1),
    (re.compile(r"put (?:an?|some) (?P<object>\w+) (?:in|on) (?P<target>\w+)"), 1),
)


@dataclass(frozen=True, slots=True)
class Goal:
    """What an instruction asks for.

    Attributes:
        object: noun of the object to find (``"mug"``).
        target: noun of the receptacle it goes to; for ``"light"`` the noun of the lamp.
        treatment: what must be done to it on the way; empty for nothing.
        count: how many of them.
    """

    object: str
    target: str
    treatment: Treatment = ""
    count: int = 1

    @classmethod
    def parse(cls, task: str) -> Goal:
        """Read one of ALFWorld's templated instructions.

        Raises:
            ValueError: the instruction is in no known form (for example a human annotation).
        """
        text = task.lower().strip().rstrip(".")
        for pattern, count in _GOALS:
            if found := pattern.search(text):
                parts = found.groupdict()
                treatment: Treatment = parts.get("verb") or _ADJECTIVE.get(parts.get("state") or "", "")  # type: ignore[assignment]
                if text.startswith(("look", "examine")):
                    treatment = "light"
                return cls(parts["object"], parts["target"], treatment, count)
        raise ValueError(
            f"The search expert cannot read the task {task!r}: it knows ALFWorld's templated instructions only."
        )


def noun(name: str) -> str:
    """``"desk 1"`` → ``"desk"``."""
    return name.rsplit(" ", 1)[0]


@dataclass(slots=True)
class _Beliefs:
    """What has been read so far."""

    receptacles: list[str]
    contents: dict[str, list[str]] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    here: str = ""
    held: str = ""
    treated: bool = False
    placed: dict[str, set[str]] = field(default_factory=dict)
    futile: set[tuple[str, str]] = field(default_factory=set)

    def where(self, kind: str) -> list[tuple[str, str]]:
        """``(object, receptacle)`` for every object of this noun that was seen and not moved since."""
        return [(o, r) for r, things in self.contents.items() for o in things if noun(o) == kind]

    def named(self, kind: str) -> list[str]:
        return [r for r in self.receptacles if noun(r) == kind]


class SearchExpert(Expert):
    """Plays one household game at a time from text alone.

    Example::

        expert = SearchExpert(seed=0)
        expert.reset("put some pen on dresser.", "... you see a desk 1, and a dresser 1.")
        action = expert.act()
        while True:
            action = expert.act(observation_after(action))

    Args:
        seed: of the order of search and of all noise.
        noise: how demonstrations stray; by default not at all.

    Attributes:
        motive: why the latest action was chosen.
    """

    phrases = ALFWORLD_PHRASES

    @override
    def reset(self, task: str, observation: str) -> None:
        self._goal = Goal.parse(task)
        receptacles = _THING.findall(observation.lower())
        if not receptacles:
            raise ValueError(f"The search expert found no receptacle in the first observation: {observation[:200]!r}.")
        self._know = _Beliefs(receptacles)
        self._queue = list(receptacles)
        if self._noise.shuffle:
            self._random.shuffle(self._queue)
        self._begun = False

    @override
    def act(self, observation: str = "") -> str:
        if self._begun:
            self._read(observation.lower())
        self._begun = True
        self._action = self._choose()
        return self._action

    @override
    def overrule(self, action: str) -> None:
        self.motive, self._action = "invalid", action

    # -- reading ------------------------------------------------------------------------------------------------

    def _read(self, text: str) -> None:
        know, words = self._know, self._action.split()
        verb, name = words[0] if words else "", " ".join(words[1:3])
        if text.startswith("nothing happens"):
            if self.motive == "invalid":
                return  # as expected
            if verb == "move":  # this receptacle does not take this object
                know.futile.add((know.held, know.here))
            elif verb == "take":  # the object is not where it was believed to be
                know.contents.pop(know.here, None)
        elif verb == "go":
            know.here = " ".join(words[2:4])
            self._see(text)
        elif verb == "open" or (verb == "examine" and name == know.here):
            self._see(text)
        elif verb == "close":
            know.closed.add(name)
        elif verb == "take":
            know.contents[know.here] = [o for o in know.contents.get(know.here, []) if o != name]
            know.held, know.treated = name, False
        elif verb == "move":
            self._put_down(name)
        elif verb == self._goal.treatment:
            know.treated = True

    def _put_down(self, name: str) -> None:
        goal, know = self._goal, self._know
        done = know.treated or not goal.treatment
        if noun(name) == goal.object and noun(know.here) == goal.target and done:
            know.placed.setdefault(know.here, set()).add(name)
        know.contents.setdefault(know.here, []).append(name)
        know.held = ""

    def _see(self, text: str) -> None:
        know = self._know
        if "you see" in text:
            know.closed.discard(know.here)
            know.contents[know.here] = _THING.findall(text.split("you see", 1)[1])
        elif "is closed" in text:
            know.closed.add(know.here)

    # -- acting -------------------------------------------------------------------------------------------------

    @override
    def _advance(self) -> str:
        goal, know = self._goal, self._know
        if know.held and noun(know.held) != goal.object:
            return self._put_back()
        if not know.held:
            return self._fetch()
        if goal.treatment == "light":
            lamps = know.where(goal.target)
            if not lamps:
                return self._search()
            lamp, place = self._nearest(lamps)
            return f"use {lamp}" if place == know.here else self._go(place)
        if goal.treatment and not know.treated:
            places = know.named(_APPLIANCE[goal.treatment])
            if not places:
                return "look"
            place = know.here if know.here in places else places[0]
            return f"{goal.treatment} {know.held} with {place}" if place == know.here else self._go(place)
        return self._place()

    def _fetch(self) -> str:
        goal, know = self._goal, self._know
        done = set().union(*know.placed.values()) if know.placed else set()
        found = [
            (o, r)
            for o, r in know.where(goal.object)
            if o not in done and not (not goal.treatment and goal.count == 1 and noun(r) == goal.target)
        ]
        if not found:
            return self._search()
        thing, place = self._nearest(found)
        return f"take {thing} from {place}" if self._ready_at(place) else self._approach(place)

    def _place(self) -> str:
        goal, know = self._goal, self._know
        places = [r for r in know.named(goal.target) if (know.held, r) not in know.futile]
        if not places:
            return "look"
        if begun := [r for r in places if know.placed.get(r)]:
            places = begun  # two objects count only in the same receptacle
        place = know.here if know.here in places else places[0]
        return f"move {know.held} to {place}" if self._ready_at(place) else self._approach(place)

    def _put_back(self) -> str:
        know = self._know
        if know.here in know.closed:
            return f"open {know.here}"
        if (know.held, know.here) not in know.futile:
            return f"move {know.held} to {know.here}"
        rest = [r for r in know.receptacles if (know.held, r) not in know.futile]
        return self._go(self._random.choice(rest)) if rest else "look"

    def _search(self) -> str:
        know = self._know
        if know.here in know.closed:
            return f"open {know.here}"
        for place in self._queue:
            if place not in know.contents:
                return f"examine {place}" if place == know.here else self._approach(place)
        know.contents.clear()  # everything was seen and something was overlooked: look again
        return self._go(self._random.choice([r for r in know.receptacles if r != know.here] or know.receptacles))

    def _nearest(self, found: list[tuple[str, str]]) -> tuple[str, str]:
        return next((pair for pair in found if pair[1] == self._know.here), found[0])

    def _ready_at(self, place: str) -> bool:
        return self._know.here == place and place not in self._know.closed

    def _approach(self, place: str) -> str:
        return f"open {place}" if self._know.here == place and place in self._know.closed else self._go(place)

    def _go(self, place: str) -> str:
        return f"go to {place}"

    # -- straying -----------------------------------------------------------------------------------------------

    @override
    def _detours(self) -> list[str]:
        return [self._go(place) for place in self._know.receptacles if place != self._know.here]

    @override
    def _wasted_moves(self) -> list[str]:
        know = self._know
        return ["look", "inventory", *(f"examine {thing}" for thing in (know.here, know.held) if thing)]

    @override
    def _mistakes(self) -> list[str]:
        know = self._know
        if know.held or know.here in know.closed:
            return []
        wrong = [o for o in know.contents.get(know.here, []) if noun(o) != self._goal.object and "lamp" not in o]
        return [f"take {thing} from {know.here}" for thing in wrong]

    @override
    def _invalid_actions(self) -> list[str]:
        know, goal = self._know, self._goal
        absent = f"{goal.object} 1"
        options = []
        if know.here:
            options.append(self._go(know.here))
            if absent != know.held:
                options.append(f"move {absent} to {know.here}")
            if absent not in know.contents.get(know.here, []):
                options.append(f"take {absent} from {know.here}")
        return options

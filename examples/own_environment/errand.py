"""An environment of one's own: find a thing in a room and pick it up. Plain Gymnasium, nothing of spear_lightning."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.spaces import Text

PLACES = tuple(f"{name} {number}" for name in ("desk", "shelf", "dresser", "sidetable") for number in (1, 2))
THINGS = ("apple", "book", "bowl", "cup", "mug", "pen", "plate", "watch")


class Errand(gymnasium.Env[str, str]):
    """Go to a place, see what lies there, pick up what the task names; whoever picks up something else has lost.

    The words are those of ALFWorld, which the policy that ships with the package can read.

    Args:
        places: in the room, at most 8.
        moves: after which the episode is cut.
    """

    def __init__(self, places: int = 4, moves: int = 8) -> None:
        self.observation_space = self.action_space = Text(1000)
        self.count, self.moves = places, moves

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Furnish the room of a task; the seed decides everything."""
        super().reset(seed=seed)
        drawn = [PLACES[number] for number in self.np_random.permutation(len(PLACES))[: self.count]]
        things = [THINGS[number] for number in self.np_random.permutation(len(THINGS))]
        # A thing at each place; one of these is asked for.
        self.room = {place: f"{thing} 1" for place, thing in zip(drawn, things, strict=False)}
        self.wanted = self.room[drawn[int(self.np_random.integers(self.count))]]
        self.here, self.left = "", self.moves
        seen = ", ".join(f"a {place}" for place in drawn)
        return f"you are in the middle of a room. looking quickly around you, you see {seen}.", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out an action; what is not admissible changes nothing, because a model may say anything."""
        self.left -= 1
        won = over = False
        text = "nothing happens."
        if action in self._admissible():
            if action.startswith("go to "):
                self.here = action.removeprefix("go to ")
                text = f"you arrive at {self.here}. on the {self.here}, you see a {self.room[self.here]}."
            else:
                thing = self.room[self.here]
                text, over, won = f"you pick up the {thing} from the {self.here}.", True, thing == self.wanted
        return text, float(won), over, not over and self.left == 0, self._info(won)

    def _admissible(self) -> list[str]:
        going = [f"go to {place}" for place in self.room if place != self.here]
        return [*going, f"take {self.room[self.here]} from {self.here}"] if self.here else going

    def _info(self, won: bool = False) -> dict[str, Any]:
        return {
            "task": f"take some {self.wanted.split()[0]}.",
            "won": won,
            "anchor": self.here or "the middle",  # names the state, for GiGPO
            "admissible_actions": self._admissible(),
        }

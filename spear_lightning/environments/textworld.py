"""Games of TextWorld's challenges (mazes, treasures, kitchens) as a task suite, on the real engine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from typing_extensions import override

from spear_lightning.environments.base import Split, Task, TaskSuite, cache_folder
from spear_lightning.environments.text import TextEnv
from spear_lightning.environments.textworld_games import GAME_FILE, MOST_GAMES, Challenge, GameFolder
from spear_lightning.utils.ranges import Positive, in_range

_ASKED = "admissible_commands objective score max_score won lost description inventory"  # of the engine


_Games = Annotated[int, Ge(1), Le(MOST_GAMES)]


@in_range
class TextWorld(TaskSuite):
    """Games of one of TextWorld's challenges.

    Args:
        challenge: ``coin_collector``, ``treasure_hunter``, ``cooking`` or ``simple``.
        settings: the challenge's own options, as ``tw-make tw-<challenge> --help`` lists them, with underscores
            (``{level: 5}``; ``{recipe: 2, take: 2, cook: true}``; ``{rewards: dense, goal: brief}``).
        grammar: options of TextWorld's text generation (``{only_last_action: true}`` states the goal instead of every
            step to it; ``{theme: basic}``).
        train: number of training games; their seeds count from 0.
        validation: number of validation games; their seeds count from 100 000 000.
        test: number of test games; their seeds count from 200 000 000.
        reward: ``win`` pays 1 for the step that wins; ``score`` pays what a step adds to the game's score, as a part
            of the highest score, so that a won game has paid 1 in all.
        max_steps: steps after which an episode is cut.
        cache_dir: where the games are kept; default ``$XDG_CACHE_HOME/spear-lightning``, else
            ``~/.cache/spear-lightning``.

    Raises:
        ValueError: an argument cannot be used; the message names it. What only TextWorld knows (``settings``,
            ``grammar``) is checked when the first game is made.
    """

    def __init__(
        self,
        challenge: Challenge = "coin_collector",
        settings: Mapping[str, Any] | None = None,
        grammar: Mapping[str, Any] | None = None,
        train: _Games = 64,
        validation: _Games = 16,
        test: _Games = 32,
        reward: Literal["win", "score"] = "win",
        max_steps: Positive = 50,
        cache_dir: str | None = None,
    ) -> None:
        self.counts: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        self.reward, self.max_steps = reward, max_steps
        self.games = GameFolder(
            cache_folder(cache_dir) / "textworld", challenge, dict(settings or {}), dict(grammar or {})
        )

    def prepare(self) -> None:
        """Make the games that are not there yet. Safe to run in several processes at once."""
        for split in self.counts:
            self.tasks(split)

    def tasks(self, split: Split) -> Sequence[Task]:
        """The games of ``split``, made if need be.

        Raises:
            ValueError: TextWorld is not installed or does not take the settings, or the games cannot be written.
        """
        names = self.games.make_all(split, self.counts[split])
        return tuple(Task(id=name, task_type=self.games.challenge) for name in names)

    def make(self) -> TextWorldEnv:
        """A fresh environment."""
        return TextWorldEnv(self.games.path, self.games.challenge, self.reward, self.max_steps)


class TextWorldEnv(TextEnv):
    """One game at a time, on the real engine.

    ``info`` carries ``admissible_actions`` (list of str), ``won`` (bool), ``anchor`` (what looking around and the
    inventory say, which names the state in GiGPO's step groups), ``task`` (the game's objective) and ``task_type``.
    What is not admissible (upper and lower case count the same) is answered by ``Nothing happens.`` and never reaches
    the interpreter, whose own commands write files, undo, restart and quit.

    Args:
        folder: holds the games; a task's id is a game's folder relative to it.
        challenge: reported as ``task_type``.
        reward: see :class:`TextWorld`.
        max_steps: steps after which an episode is truncated.
    """

    def __init__(self, folder: Path, challenge: str, reward: str = "win", max_steps: int = 50) -> None:
        super().__init__(max_steps)
        self._folder, self._challenge, self._reward = folder, challenge, reward
        self._engine: Any = None

    @override
    def _begin(self, task: str) -> str:
        path = self._folder / task / GAME_FILE
        if not path.is_file():
            raise ValueError(f'reset needs options={{"task": <id of TextWorld.tasks(split)>}}; there is no {path}')
        if task != self._task:
            self.close()  # an interpreter that loads a second game never frees the first: 0.4 MB each
            self._engine = _started(path)
        self._state = self._engine.reset()
        self._objective, self._highest = str(self._state.objective or ""), int(self._state.max_score or 0)
        return _readable(self._state.feedback)

    @override
    def _act(self, action: str) -> tuple[str, float, bool]:
        said = " ".join(action.lower().split())
        command = next((known for known in self._state.admissible_commands if known.lower() == said), None)
        text, gain = "Nothing happens.", 0
        if command is not None:
            before = int(self._state.score or 0)
            self._state, _, _ = self._engine.step(command)
            text, gain = _readable(self._state.feedback), int(self._state.score or 0) - before
        won = bool(self._state.won)
        reward = gain / max(self._highest, 1) if self._reward == "score" else float(won)
        return text, reward, bool(won or self._state.lost)

    @override
    def _info(self) -> dict[str, Any]:
        return {
            "admissible_actions": list(self._state.admissible_commands),
            "won": bool(self._state.won),
            "anchor": f"{self._state.description}\n{self._state.inventory}",
            "task": self._objective,
            "task_type": self._challenge,
        }

    @override
    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine, self._task, self._over = None, "", True


def _started(path: Path) -> Any:
    import textworld

    engine = textworld.start(str(path), textworld.EnvInfos(**dict.fromkeys(_ASKED.split(), True)))
    engine.seed(0)  # else the interpreter is seeded by the clock
    return engine


def _readable(feedback: str) -> str:
    """A game's text without the title's letters of ``$``, the interpreter's prompt and status line, and padding."""
    text = re.sub(r"\n>[^\n]*\Z", "", feedback).partition("Would you like to RESTART")[0]
    lines = [line.strip() for line in text.rpartition("$$")[2].splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

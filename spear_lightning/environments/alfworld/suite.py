"""The ALFWorld task suite: which games there are, and who plays them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import gymnasium

from spear_lightning.environments.alfworld.games import GameList, read_split
from spear_lightning.environments.alfworld.generated import GameSet, make_game_set
from spear_lightning.environments.alfworld.generator import SceneSize
from spear_lightning.environments.alfworld.rooms import TASK_TYPES
from spear_lightning.environments.base import Split, Task, TaskSuite, cache_folder, require
from spear_lightning.utils.ranges import NotNegative, Positive, in_range

logger = logging.getLogger(__name__)


@in_range
class ALFWorld(TaskSuite):
    """ALFWorld games, generated here or downloaded.

    Args:
        games: ``generated`` (made once from the files the package ships, kept under ``cache_dir``) or ``official``.
        data_dir: folder of official games, the one that holds ``json_2.1.1``; default ``$ALFWORLD_DATA``, else
            ``~/.cache/alfworld``, where ``alfworld-download`` puts them.
        cache_dir: where generated games and translations are kept; default ``$XDG_CACHE_HOME/spear-lightning``, else
            ``~/.cache/spear-lightning``.
        task_types: which of the six task types to play; default all.
        train: number of generated training games. Official data has its own numbers.
        validation: number of generated validation games.
        test: number of generated test games.
        train_seed: first seed of the generated training games; game ``i`` has seed ``train_seed + i``.
        validation_seed: first seed of the validation games.
        test_seed: first seed of the test games.
        scene: how large generated rooms are.
        max_steps: steps after which an episode is cut.

    Raises:
        ValueError: an argument cannot be used; the message names it.
    """

    def __init__(
        self,
        games: Literal["generated", "official"] = "generated",
        data_dir: str | None = None,
        cache_dir: str | None = None,
        task_types: list[str] | None = None,
        train: Positive = 480,
        validation: Positive = 96,
        test: Positive = 192,
        train_seed: NotNegative = 0,
        validation_seed: NotNegative = 1_000_000,
        test_seed: NotNegative = 2_000_000,
        scene: SceneSize | None = None,
        max_steps: Positive = 50,
    ) -> None:
        kinds = tuple(TASK_TYPES if task_types is None else task_types)
        unknown = [name for name in kinds if name not in TASK_TYPES]
        if unknown or not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"task_types must name some of {', '.join(TASK_TYPES)}, each once; got {list(kinds)}")
        self.max_steps = max_steps
        self._cache_dir = cache_folder(cache_dir) / "alfworld"
        self._source: _Generated | _Official
        if games == "generated":
            size = scene or SceneSize()
            sets: dict[Split, GameSet] = {
                "train": GameSet(kinds, train_seed, train, size),
                "validation": GameSet(kinds, validation_seed, validation, size),
                "test": GameSet(kinds, test_seed, test, size),
            }
            self._source = _Generated(self._cache_dir, sets)
        else:
            folder = data_dir or os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld"
            self._source = _Official(Path(folder).expanduser(), kinds)

    def prepare(self) -> None:
        """Generate the games, or check the data folder. Safe to run in several processes at once.

        Raises:
            ValueError: ALFWorld is not installed, or its data cannot be used; the message says what to do.
        """
        _require_alfworld()
        self._source.prepare()

    def tasks(self, split: Split) -> Sequence[Task]:
        """The games of ``split``; task types take turns, so any first part of the list is balanced.

        Raises:
            ValueError: the split has no games; the message names the folder or setting.
        """
        _require_alfworld()
        return tuple(Task(id=name, task_type=task_type) for name, task_type in self._source.games(split))

    def make(self) -> gymnasium.Env[str, str]:
        """A fresh environment. The environments of a process share loaded games."""
        _require_alfworld()
        from spear_lightning.environments.alfworld.environment import ALFWorldEnv

        return ALFWorldEnv(self._source.root, self._games, self.max_steps)

    @cached_property
    def _games(self) -> Any:
        # A GameCache. Nothing here may name what imports TextWorld, not even for type checkers: jsonargparse looks
        # their names up, and every run would wait for it in its main process.
        from spear_lightning.environments.alfworld.engine import GameCache

        return GameCache(self._cache_dir / "translations")


@dataclass
class _Generated:
    """Games made here, one folder for each split."""

    root: Path
    sets: dict[Split, GameSet]

    def __post_init__(self) -> None:
        ordered = sorted(self.sets.items(), key=lambda item: item[1].first_seed)
        for (first, games), (second, later) in pairwise(ordered):
            end = games.first_seed + games.count
            if end > later.first_seed:
                raise ValueError(
                    f"the {first} games (seeds {games.first_seed} to {end - 1}) overlap the {second} games (from seed "
                    f"{later.first_seed}): move {second}_seed up or ask for fewer games"
                )

    def prepare(self) -> None:
        for split in self.sets:
            self.games(split)

    def games(self, split: Split) -> Sequence[tuple[str, str]]:
        return make_game_set(self.root, self.sets[split], split)


@dataclass
class _Official:
    """Downloaded games."""

    root: Path
    kinds: tuple[str, ...]
    lists: dict[Split, GameList] = field(default_factory=dict)

    def prepare(self) -> None:
        self.games("train")

    def games(self, split: Split) -> Sequence[tuple[str, str]]:
        if split not in self.lists:
            found = self.lists[split] = read_split(self.root, split, self.kinds)
            if found.unsolvable or found.unsupported:
                logger.info(
                    "ALFWorld %s: %d games; left out %d not marked solvable and %d with movable receptacles or slices",
                    *(split, len(found.games), found.unsolvable, found.unsupported),
                )
        return self.lists[split].games


def _require_alfworld() -> None:
    require("ALFWorld", "alfworld", {name: name for name in ("alfworld", "textworld", "fast_downward")})

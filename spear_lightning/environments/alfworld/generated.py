"""Sets of generated games on disk: made once, whole or not at all, by as many processes as ask for them."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, repeat, tee
from pathlib import Path

from spear_lightning.environments.alfworld.games import read_json, write_game
from spear_lightning.environments.alfworld.generator import GeneratedGame, SceneSize, generate_game
from spear_lightning.environments.base import show_progress
from spear_lightning.utils.atomic import make_once

_FORMAT = 1  # raise when games of equal settings come out differently
_INDEX = "index.json"
_PARALLEL_FROM = 64  # games; starting processes costs about a second
_CHUNK = 8  # games a worker process makes at a time

Recipe = tuple[str, int, SceneSize]
"""Task type, seed and scene size: the arguments of :func:`~.generator.generate_game`."""


@dataclass(frozen=True, slots=True)
class GameSet:
    """Settings of a set of generated games.

    Attributes:
        kinds: task types, which take turns.
        first_seed: seed of the first game.
        count: number of games.
        scene: size of the rooms.
    """

    kinds: tuple[str, ...]
    first_seed: int
    count: int
    scene: SceneSize

    @property
    def name(self) -> str:
        """Folder name: a digest of the settings and of what else decides the games."""
        settings = {
            "format": _FORMAT,
            "alfworld": version("alfworld"),
            "textworld": version("textworld"),
            **asdict(self),
        }
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()

    def recipes(self) -> list[Recipe]:
        """Arguments of :func:`generate_game` for each game."""
        return [
            (self.kinds[number % len(self.kinds)], self.first_seed + number, self.scene) for number in range(self.count)
        ]


def make_game_set(root: Path, games: GameSet, label: str) -> list[tuple[str, str]]:
    """Generate a set of games unless it is there already.

    Args:
        root: folder of sets; translations go to ``<root>/translations``.
        games: settings.
        label: what the set is called in the progress bar.

    Returns:
        ``(id, task type)`` of each game in the order of their seeds; an id is a game's folder relative to ``root``.

    Raises:
        ValueError: the folder cannot be written; the message names it.
    """
    name = games.name
    try:
        folder = make_once(root, name, _INDEX, lambda partial: _generate(root, partial, games, label))
    except OSError as error:
        raise ValueError(f"cannot write generated ALFWorld games under {root} ({error}): set cache_dir") from error
    entries = read_json(folder / _INDEX)["games"]
    return [(f"{name}/{game}", task_type) for game, task_type in entries]


def _generate(root: Path, folder: Path, games: GameSet, label: str) -> None:
    entries = []
    solved: Iterable[tuple[GeneratedGame, list[str]]] = _solved(games, root / "translations")
    if games.count >= _PARALLEL_FROM:
        solved = show_progress(solved, games.count, f"ALFWorld {label} games")
    for game, walkthrough in solved:
        path = write_game(folder, game, walkthrough)
        entries.append((path.relative_to(folder).as_posix(), game.task_type))
    settings = {"settings": asdict(games), "games": entries}
    (folder / _INDEX).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _solved(games: GameSet, translations: Path) -> Iterator[tuple[GeneratedGame, list[str]]]:
    recipes = games.recipes()
    workers = min(os.cpu_count() or 1, 16, len(recipes) // (_PARALLEL_FROM // 2))
    if workers < 2:
        yield from solved_games(translations, recipes)
        return
    chunks = [recipes[start : start + _CHUNK] for start in range(0, len(recipes), _CHUNK)]
    # Spawned, not forked: the caller may hold threads. Processes, not threads: the translator is not thread-safe.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from chain.from_iterable(pool.map(_solved_chunk, repeat(translations), chunks))


def _solved_chunk(translations: Path, recipes: list[Recipe]) -> list[tuple[GeneratedGame, list[str]]]:
    return list(solved_games(translations, recipes))


def solved_games(translations: Path | None, recipes: Iterable[Recipe]) -> Iterator[tuple[GeneratedGame, list[str]]]:
    """Draw games and let the planner prove that each can be won.

    Args:
        translations: folder where translations are kept for play, or ``None``.
        recipes: task type, seed and scene size of each game.

    Yields:
        Each game with the planner's walkthrough, which is never empty.
    """
    from spear_lightning.environments.alfworld.engine import GameCache, solve

    drawn, entries = tee(generate_game(*recipe) for recipe in recipes)
    for game, walkthrough in zip(
        drawn, solve(GameCache(translations), (game.entries for game in entries)), strict=True
    ):
        if not walkthrough:
            raise RuntimeError(
                f"the planner cannot win the game {game.task_type}, {game.trial}: the generator is at fault"
            )
        yield game, walkthrough

"""ALFWorld's data folder: reading the official layout, and writing it.

A game is a folder ``<root>/json_2.1.1/<split>/<task>-<object>-<movable>-<receptacle>-<scene>/<trial>/`` with two files:
``game.tw-pddl`` (JSON: the PDDL domain and problem, the grammar, whether it is solvable, a walkthrough) and
``traj_data.json`` (of which the task type is read).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from spear_lightning.environments.alfworld.generator import GeneratedGame
from spear_lightning.environments.alfworld.rooms import TASK_TYPES
from spear_lightning.environments.base import Split

GAME_FILE = "game.tw-pddl"
TRAJECTORY_FILE = "traj_data.json"
DATA_FOLDER = "json_2.1.1"
SPLIT_FOLDERS: dict[Split, str] = {"train": "train", "validation": "valid_seen", "test": "valid_unseen"}
"""Folder of each split. ALFWorld calls the last two ``eval_in_distribution`` and ``eval_out_of_distribution``."""


@dataclass(frozen=True, slots=True)
class GameList:
    """The playable games of a split.

    Attributes:
        games: ``(id, task type)``; the id is the game's folder relative to the data folder, with forward slashes. Task
            types take turns, so that any first part of the list is balanced.
        unsolvable: how many games were left out because they are not marked solvable.
        unsupported: how many were left out because ALFWorld cannot play them (movable receptacles, sliced objects).
    """

    games: tuple[tuple[str, str], ...]
    unsolvable: int = 0
    unsupported: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read or is no JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); download or generate it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object; download or generate it again")
    return value


def read_game(path: Path) -> dict[str, Any]:
    """Read a ``game.tw-pddl``.

    Raises:
        ValueError: the file cannot be read, is not JSON, or lacks an entry; the message names it.
    """
    game = read_json(path)
    missing = [key for key in ("pddl_domain", "pddl_problem", "grammar") if not isinstance(game.get(key), str)]
    if missing:
        raise ValueError(f"{path} is no ALFWorld game: it has no text {' and no text '.join(missing)}")
    return game


def read_split(root: Path, split: Split, task_types: Sequence[str]) -> GameList:
    """List the playable games of a split in the official layout, by the rules of ALFWorld's own reader.

    Args:
        root: data folder (the one that holds ``json_2.1.1``).
        split: which games.
        task_types: task types wanted.

    Raises:
        ValueError: the folder is missing or holds no game that fits, or a file cannot be read; the message names it.
    """
    folder = root / DATA_FOLDER / SPLIT_FOLDERS[split]
    if not folder.is_dir():
        raise ValueError(
            f"ALFWorld's {split} games are not at {folder}; run `alfworld-download --data-dir {root}`, or set data_dir "
            "(default: $ALFWORLD_DATA) to the folder that holds json_2.1.1"
        )
    found: dict[str, list[str]] = {task_type: [] for task_type in task_types}
    unsolvable = unsupported = other = 0
    for trial in _trials(folder):
        name = trial.relative_to(folder).as_posix()
        if "movable" in name or "Sliced" in name:
            unsupported += 1
            continue
        task_type = read_json(trial / TRAJECTORY_FILE).get("task_type")
        if task_type not in TASK_TYPES:
            raise ValueError(
                f"{trial / TRAJECTORY_FILE}: unknown task_type {task_type!r}; known: {', '.join(TASK_TYPES)}"
            )
        if task_type not in found:
            other += 1
        elif not read_game(trial / GAME_FILE).get("solvable"):
            unsolvable += 1
        else:
            found[task_type].append(trial.relative_to(root).as_posix())
    games = tuple(
        chain.from_iterable(
            (pair for pair in turn if pair is not None)
            for turn in zip_longest(*([(name, task_type) for name in names] for task_type, names in found.items()))
        )
    )
    if not games:
        raise ValueError(
            f"{folder} holds no game to play: {unsolvable} not solvable, {unsupported} with movable receptacles or "
            f"sliced objects, {other} of other task types than {', '.join(task_types)}; "
            f"run `alfworld-download --data-dir {root}` or change task_types"
        )
    return GameList(games, unsolvable, unsupported)


def _trials(folder: Path) -> Iterator[Path]:
    """Folders with both files of a game, in the order of their names."""
    for path, folders, files in os.walk(folder):
        folders.sort()
        if TRAJECTORY_FILE in files and GAME_FILE in files:
            yield Path(path)


def write_game(folder: Path, game: GeneratedGame, walkthrough: list[str]) -> Path:
    """Write a generated game as ``<folder>/<name>/<trial>/`` and return that path.

    Args:
        folder: split folder, for example ``json_2.1.1/train``.
        game: the game.
        walkthrough: commands that win it.
    """
    trial = folder / game.name / game.trial
    trial.mkdir(parents=True, exist_ok=True)
    (trial / GAME_FILE).write_text(game.game_json(walkthrough), encoding="utf-8")
    (trial / TRAJECTORY_FILE).write_text(game.trajectory_json(), encoding="utf-8")
    return trial


def write_official_layout(root: Path, split: Split, games: Iterable[tuple[GeneratedGame, list[str]]]) -> list[str]:
    """Write generated games as an official data folder, for tests and for tools that expect one.

    Args:
        root: data folder; made if need be.
        split: which split's folder to fill.
        games: games with their walkthroughs (:func:`~.generated.solved_games` makes them).

    Returns:
        The ids of the games written.
    """
    folder = root / DATA_FOLDER / SPLIT_FOLDERS[split]
    folder.mkdir(parents=True, exist_ok=True)
    return [write_game(folder, game, plan).relative_to(root).as_posix() for game, plan in games]

"""A few solved games of every type, made once for all ALFWorld tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("alfworld")

from spear_lightning.environments.alfworld.engine import GameCache
from spear_lightning.environments.alfworld.games import GAME_FILE, read_split, write_official_layout
from spear_lightning.environments.alfworld.generated import solved_games
from spear_lightning.environments.alfworld.generator import GeneratedGame, SceneSize
from spear_lightning.environments.alfworld.rooms import TASK_TYPES

SMALL = SceneSize(receptacles=(4, 6), distractors=(1, 3))


@pytest.fixture(scope="session")
def solved(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[GeneratedGame, list[str]]]:
    """One small game of each type with its walkthrough, and two in larger rooms."""
    recipes = [(kind, 11 + number, SMALL) for number, kind in enumerate(TASK_TYPES)]
    larger = SceneSize(receptacles=(9, 12), distractors=(6, 9))
    recipes += [("pick_heat_then_place_in_recep", 5, larger), ("pick_two_obj_and_place", 6, larger)]
    return list(solved_games(None, recipes))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, solved: list[tuple[GeneratedGame, list[str]]]) -> Path:
    """The same games as an official training folder."""
    root = tmp_path_factory.mktemp("alfworld-data")
    write_official_layout(root, "train", solved)
    return root


@pytest.fixture(scope="session")
def game_files(data_folder: Path) -> list[str]:
    """Their game files."""
    games = read_split(data_folder, "train", TASK_TYPES).games
    return [str(data_folder / name / GAME_FILE) for name, _ in games]


@pytest.fixture
def cache(tmp_path: Path) -> GameCache:
    """A cache of loaded games that keeps its translations in a folder of the test's own."""
    return GameCache(tmp_path / "translations")

"""The official layout: written, read back, and each way in which it can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spear_lightning.environments.alfworld.games import GAME_FILE, read_game, read_split, write_official_layout
from spear_lightning.environments.alfworld.generator import GeneratedGame
from spear_lightning.environments.alfworld.rooms import TASK_TYPES


@pytest.fixture
def folder(tmp_path: Path, data_folder: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


def first_trial(folder: Path) -> Path:
    return folder / read_split(folder, "train", TASK_TYPES).games[0][0]


def test_what_is_written_is_read_back(tmp_path: Path, solved: list[tuple[GeneratedGame, list[str]]]) -> None:
    ids = write_official_layout(tmp_path, "test", solved)
    found = read_split(tmp_path, "test", TASK_TYPES)
    assert sorted(name for name, _ in found.games) == sorted(ids)
    assert all(name.startswith(f"json_2.1.1/valid_unseen/{kind}-") for name, kind in found.games)
    # Types take turns, so a first part of the list holds every type.
    assert [kind for _, kind in found.games[:6]] == list(TASK_TYPES)
    by_trial = {game.trial: (game, plan) for game, plan in solved}
    for name, kind in found.games:
        game, plan = by_trial[Path(name).name]
        entries = read_game(tmp_path / name / GAME_FILE)
        assert (kind, game.entries, plan) == (
            game.task_type,
            {key: entries[key] for key in game.entries},
            entries["walkthrough"],
        )


def test_alfworlds_own_reader_finds_the_same_games(data_folder: Path) -> None:
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    config = {
        "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"data_path": str(data_folder / "json_2.1.1" / "train"), "num_train_games": -1},
    }
    theirs = AlfredTWEnv(config, "train").game_files
    ours = [str(data_folder / name / GAME_FILE) for name, _ in read_split(data_folder, "train", TASK_TYPES).games]
    assert sorted(theirs) == sorted(ours)


def test_a_missing_folder_names_the_download(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"alfworld-download.*data_dir") as caught:
        read_split(tmp_path / "nowhere", "validation", TASK_TYPES)
    assert str(tmp_path / "nowhere" / "json_2.1.1" / "valid_seen") in str(caught.value)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "json_2.1.1" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no game to play"):
        read_split(tmp_path, "train", TASK_TYPES)


def test_a_corrupt_game_is_named(folder: Path) -> None:
    path = first_trial(folder) / GAME_FILE
    for content in (b"{", b"\xff\xfe", b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"JSON.*again") as caught:
            read_split(folder, "train", TASK_TYPES)
        assert str(path) in str(caught.value)
    path.write_text(json.dumps({"solvable": True, "grammar": 3}))
    with pytest.raises(ValueError, match="no text pddl_domain and no text pddl_problem and no text grammar"):
        read_split(folder, "train", TASK_TYPES)


def test_an_unknown_task_type_is_named(folder: Path) -> None:
    path = first_trial(folder) / "traj_data.json"
    path.write_text(json.dumps({"task_type": "pick_nose"}))
    with pytest.raises(ValueError, match="unknown task_type 'pick_nose'") as caught:
        read_split(folder, "train", TASK_TYPES)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mark", [False, None, "absent"])
def test_games_not_marked_solvable_are_left_out_and_counted(folder: Path, mark: object) -> None:
    path = first_trial(folder) / GAME_FILE
    game = json.loads(path.read_text())
    del game["solvable"]
    path.write_text(json.dumps(game if mark == "absent" else {**game, "solvable": mark}))
    found = read_split(folder, "train", TASK_TYPES)
    assert (found.unsolvable, len(found.games)) == (1, 7)
    assert path.parent.relative_to(folder).as_posix() not in [name for name, _ in found.games]


def test_movable_receptacles_are_left_out_and_counted(folder: Path) -> None:
    trial = first_trial(folder)
    shutil.copytree(trial, folder / "json_2.1.1" / "train" / "pick_and_place_with_movable_recep-Mug-Bowl-Shelf-1" / "t")
    found = read_split(folder, "train", TASK_TYPES)
    assert (found.unsupported, len(found.games)) == (1, 8)


def test_only_the_task_types_asked_for(folder: Path) -> None:
    found = read_split(folder, "train", ["pick_two_obj_and_place"])
    assert [kind for _, kind in found.games] == ["pick_two_obj_and_place"] * 2
    for name, _ in found.games:
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"6 of other task types than pick_two_obj_and_place.*task_types"):
        read_split(folder, "train", ["pick_two_obj_and_place"])

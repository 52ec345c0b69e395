"""The suite: from its settings to environments that play."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from gymnasium.error import ResetNeeded

from spear_lightning.environments.alfworld import ALFWorld
from spear_lightning.environments.alfworld.environment import ALFWorldEnv
from spear_lightning.environments.alfworld.games import GAME_FILE, read_game, write_official_layout
from spear_lightning.environments.alfworld.generator import GeneratedGame, SceneSize
from spear_lightning.environments.alfworld.rooms import TASK_TYPES
from spear_lightning.environments.base import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SCENE = SceneSize(receptacles=(4, 5), distractors=(1, 2))


def small(cache_dir: Path) -> ALFWorld:
    return ALFWorld(cache_dir=str(cache_dir), train=6, validation=2, test=1, scene=SCENE, max_steps=12)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> ALFWorld:
    games = small(tmp_path_factory.mktemp("cache"))
    games.prepare()
    return games


@pytest.fixture
def env(prepared: ALFWorld) -> ALFWorldEnv:
    return prepared.make()


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def walkthrough(games: ALFWorld, task: str) -> list[str]:
    return list(read_game(games._source.root / task / GAME_FILE)["walkthrough"])


def test_every_split_has_its_number_of_games_and_types_take_turns(prepared: ALFWorld) -> None:
    assert [len(prepared.tasks(split)) for split in SPLITS] == [6, 2, 1]
    assert [task.task_type for task in prepared.tasks("train")] == list(TASK_TYPES)
    assert prepared.tasks("train") == prepared.tasks("train")


def test_other_users_of_a_shared_cache_can_read_the_games(prepared: ALFWorld) -> None:
    for split in SPLITS:
        folder = prepared._source.root / prepared.tasks(split)[0].id.partition("/")[0]
        assert folder.stat().st_mode & 0o055 == 0o055


def test_train_and_held_out_games_are_apart(prepared: ALFWorld) -> None:
    root = prepared._source.root
    problems = [
        read_game(root / task.id / GAME_FILE)["pddl_problem"] for split in SPLITS for task in prepared.tasks(split)
    ]
    assert len(set(problems)) == 9
    assert len({Path(task.id).name for split in SPLITS for task in prepared.tasks(split)}) == 9


def test_same_seeds_same_games_byte_for_byte(prepared: ALFWorld, tmp_path: Path) -> None:
    # In another process, with another hash seed.
    code = (
        "import sys; from spear_lightning.environments.alfworld import ALFWorld, SceneSize;"
        "scene = SceneSize(receptacles=(4, 5), distractors=(1, 2));"
        "ALFWorld(cache_dir=sys.argv[1], train=6, validation=2, test=1, scene=scene).prepare()"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert files(tmp_path / "alfworld") == files(prepared._source.root)


def test_the_environment_follows_the_gymnasium_api(prepared: ALFWorld, env: ALFWorldEnv) -> None:
    for task in prepared.tasks("train"):
        text, info = env.reset(seed=task.seed, options={"task": task.id})
        assert text.startswith("-= Welcome to TextWorld, ALFRED! =-")
        assert text.endswith(f"Your task is to: {info['task']}")
        assert (info["won"], info["task_type"], info["anchor"]) == (False, task.task_type, text)
        commands = walkthrough(prepared, task.id)
        for number, command in enumerate(commands):
            assert command in info["admissible_actions"]
            assert "help" not in info["admissible_actions"]
            text, reward, terminated, truncated, info = env.step(command)
            last = number == len(commands) - 1
            assert (reward, terminated, truncated, info["won"]) == (float(last), last, False, last)
        with pytest.raises(ResetNeeded):
            env.step("look")


def test_no_action_is_fatal(prepared: ALFWorld, env: ALFWorldEnv) -> None:
    text, info = env.reset(options={"task": prepared.tasks("train")[0].id})
    admissible = info["admissible_actions"]
    for action in ("x" * 10_000, "", "\0\udcff\ufffd", "go to {r.name}", "#intro#", None, 3, b"look", ["look"]):
        text, reward, terminated, truncated, info = env.step(action)  # type: ignore[arg-type]
        assert (text, reward, terminated, truncated) == ("Nothing happens.", 0.0, False, False)
        assert info["admissible_actions"] == admissible
    assert env.step("  look\n")[0].startswith("You are in the middle of a room")


def test_the_step_limit_truncates(prepared: ALFWorld, env: ALFWorldEnv) -> None:
    env.reset(options={"task": prepared.tasks("train")[0].id})
    ends = [env.step("look")[2:4] for _ in range(12)]
    assert ends == [(False, False)] * 11 + [(False, True)]
    with pytest.raises(ResetNeeded):
        env.step("look")
    env.reset()
    assert env.step("look")[3] is False


def test_a_reset_without_a_task_and_an_unknown_task_are_named(prepared: ALFWorld, env: ALFWorldEnv) -> None:
    with pytest.raises(ValueError, match="options="):
        env.reset()
    with pytest.raises(ValueError, match=r"no-such-game.*game\.tw-pddl"):
        env.reset(options={"task": "no-such-game"})
    with pytest.raises(ResetNeeded):
        env.step("look")
    assert env.reset(options={"task": prepared.tasks("test")[0].id})[0]


def test_a_suite_that_has_played_can_be_sent_to_a_worker(prepared: ALFWorld, env: ALFWorldEnv) -> None:
    task = prepared.tasks("train")[1]
    expected = env.reset(options={"task": task.id})
    sent = pickle.dumps(prepared)
    assert len(sent) < 2000
    assert pickle.loads(sent).make().reset(options={"task": task.id}) == expected


def test_thirty_two_environments_in_one_process(prepared: ALFWorld) -> None:
    envs = [prepared.make() for _ in range(32)]
    tasks = [prepared.tasks("train")[number % 6] for number in range(32)]
    for env, task in zip(envs, tasks, strict=True):
        env.reset(options={"task": task.id})
    won: Counter[int] = Counter()
    plans = [walkthrough(prepared, task.id) for task in tasks]
    for step in range(max(map(len, plans))):  # all games go on side by side
        for number, (env, plan) in enumerate(zip(envs, plans, strict=True)):
            if step < len(plan):
                won[number] += env.step(plan[step])[2]
    assert all(won[number] == 1 for number in range(32))


def test_processes_that_prepare_at_once_make_the_games_once(tmp_path: Path, prepared: ALFWorld) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=small(tmp_path).prepare) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert files(tmp_path / "alfworld") == files(prepared._source.root)
    assert not list((tmp_path / "alfworld").glob("*.partial-*"))


def test_an_interrupted_preparation_leaves_nothing_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spear_lightning.environments.alfworld import games as games_module
    from spear_lightning.environments.alfworld import generated

    games, written = small(tmp_path), []

    def interrupted(*arguments: object) -> Path:
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_game(*arguments)  # type: ignore[arg-type]

    write_game = games_module.write_game
    monkeypatch.setattr(generated, "write_game", interrupted)
    with pytest.raises(KeyboardInterrupt):
        games.prepare()
    assert [path.name for path in (tmp_path / "alfworld").iterdir() if path.is_dir()] == ["translations"]
    monkeypatch.setattr(generated, "write_game", write_game)
    assert len(games.tasks("train")) == 6


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache_dir") as caught:
        small(tmp_path / "file").prepare()
    assert str(tmp_path / "file") in str(caught.value)


def test_the_cache_follows_the_users_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ALFWorld()._source.root == tmp_path / "spear-lightning" / "alfworld"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ALFWorld()._source.root == tmp_path / "home" / ".cache" / "spear-lightning" / "alfworld"


def test_official_games_are_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[tuple[GeneratedGame, list[str]]]
) -> None:
    for split in SPLITS:
        write_official_layout(tmp_path, split, solved[:2])
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    for games in (
        ALFWorld(games="official", cache_dir=str(tmp_path / "cache")),
        ALFWorld(games="official", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache")),
    ):
        games.prepare()
        (first, _) = games.tasks("validation")
        env = games.make()
        env.reset(options={"task": first.id})
        for command in walkthrough(games, first.id):
            won = env.step(command)[2]
        assert won
    assert list((tmp_path / "cache").rglob("*.json.gz"))  # never in the data folder, which may be read-only


def test_missing_official_data_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="alfworld-download") as caught:
        ALFWorld(games="official").prepare()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_types": ["pick_nose"]}, "task_types.*pick_nose"),
        ({"task_types": []}, "task_types"),
        ({"task_types": [TASK_TYPES[0]] * 2}, "each once"),
        ({"games": "downloaded"}, "games must be"),
        ({"max_steps": 0}, "max_steps"),
        ({"validation": 0}, "validation must be at least 1"),
        ({"test_seed": -1}, "test_seed"),
        ({"train": 1_000_001}, "train games.*overlap.*validation_seed"),
        ({"test_seed": 400}, "overlap the test games.*test_seed"),
    ],
)
def test_bad_settings_are_named_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALFWorld(**settings)  # type: ignore[arg-type]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_lightning.environments.base.find_spec", lambda name: None)
    for use in (ALFWorld().prepare, lambda: ALFWorld().tasks("train"), ALFWorld().make):
        with pytest.raises(ValueError, match=r"pip install 'spear-lightning\[alfworld\]'"):
            use()


def test_importing_the_suite_loads_no_engine() -> None:
    code = "import sys, spear_lightning.environments.alfworld as a; a.ALFWorld(); "
    code += "sys.exit(any(name in sys.modules for name in ('alfworld', 'textworld', 'fast_downward')))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )

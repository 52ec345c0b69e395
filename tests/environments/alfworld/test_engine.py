"""The fast engine says what the stock engine says, and no action can break it."""

from __future__ import annotations

import gc
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
from textworld.envs.pddl import PddlEnv

from spear_lightning.environments.alfworld.engine import GameCache, make_engine, solve
from spear_lightning.environments.alfworld.games import write_official_layout
from spear_lightning.environments.alfworld.generated import solved_games
from spear_lightning.environments.alfworld.generator import GeneratedGame, SceneSize
from spear_lightning.environments.alfworld.rooms import TASK_TYPES
from spear_lightning.environments.alfworld.translation import UnsolvableGameError

Record = tuple[str, tuple[str, ...], bool, bool]


def stock_engine(**infos: bool) -> Any:
    return AlfredInfos(AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True, **infos))))


def record(state: Any, done: bool = False) -> Record:
    return state.feedback, tuple(state["admissible_commands"]), bool(state["won"]), done


def play(engine: Any, path: str, seed: int, length: int) -> list[Record]:
    """A seeded random walk with the walkthrough's commands among it; some commands are nonsense."""
    rng = random.Random(seed)
    engine.load(path)
    state = engine.reset()
    records = [record(state)]
    walkthrough = list(json.loads(Path(path).read_text())["walkthrough"])
    while len(records) < length:
        choice = rng.random()
        if choice < 0.1:
            command = rng.choice(["open the pod bay doors", "", " look ", "go to", "take nothing 1 from shelf 1"])
        elif choice < 0.6 or not walkthrough:
            command = rng.choice(state["admissible_commands"])
        else:
            command = walkthrough.pop(0)
        state, _, done = engine.step(command)
        records.append(record(state, done))
    return records


def finish(engine: Any, path: str) -> list[Record]:
    """Play the walkthrough from the start."""
    engine.load(path)
    records = [record(engine.reset())]
    for command in json.loads(Path(path).read_text())["walkthrough"]:
        state, _, done = engine.step(command)
        records.append(record(state, done))
    return records


def test_walkthroughs_win_only_with_their_last_command(cache: GameCache, game_files: list[str]) -> None:
    engine = make_engine(cache)
    for path in game_files:
        won = [now for _, _, now, _ in finish(engine, path)]
        assert won == [False] * (len(won) - 1) + [True], path


def test_short_transcripts_equal_the_stock_engines(cache: GameCache, game_files: list[str]) -> None:
    stock, fast = stock_engine(), make_engine(cache)
    for path in game_files[:2]:
        assert play(fast, path, seed=1, length=8) == play(stock, path, seed=1, length=8)


@pytest.mark.slow
def test_transcripts_equal_the_stock_engines(tmp_path: Path, cache: GameCache) -> None:
    sizes = (SceneSize(), SceneSize(receptacles=(10, 14), distractors=(6, 10)))
    recipes = [(kind, 100 + number, size) for number, size in enumerate(sizes) for kind in TASK_TYPES]
    ids = write_official_layout(tmp_path, "train", solved_games(None, recipes))
    stock, fast = stock_engine(), make_engine(cache)
    compared = 0
    for number, name in enumerate(ids):
        path = str(tmp_path / name / "game.tw-pddl")
        expected = play(stock, path, seed=number, length=28)
        for _ in range(2):  # the second time everything comes from memory
            assert play(fast, path, seed=number, length=28) == expected, name
        compared += len(expected)
    assert len(ids) == 12
    assert compared >= 300


def test_plans_equal_the_stock_planners_in_the_middle_of_a_game(cache: GameCache, game_files: list[str]) -> None:
    path = game_files[2]
    fast = make_engine(cache, textworld.EnvInfos(won=True, admissible_commands=True, policy_commands=True))
    plans = []
    for engine in (stock_engine(policy_commands=True), fast):
        engine.load(path)
        plan = engine.reset()["policy_commands"]
        state, _, _ = engine.step(plan[0])
        plans.append((plan, state["policy_commands"]))
    assert plans[0] == plans[1]
    assert plans[0][1] == plans[0][0][1:]


def test_a_translation_from_disk_plays_the_same_game(tmp_path: Path, game_files: list[str]) -> None:
    folder = tmp_path / "kept"
    made = play(make_engine(GameCache(folder)), game_files[3], seed=3, length=12)
    (kept,) = folder.glob("*/*.json.gz")
    read = play(make_engine(GameCache(folder)), game_files[3], seed=3, length=12)
    assert made == read
    whole = kept.read_bytes()
    damaged = (
        whole[:1000],
        whole[:500] + b"\0\0\0\0" + whole[504:],
        b"",
        gzip.compress(b'{"sas": 1}'),
        gzip.compress(b"[]"),
    )
    for content in damaged:  # made anew
        kept.write_bytes(content)
        assert play(make_engine(GameCache(folder)), game_files[3], seed=3, length=12) == made
        assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path, game_files: list[str]) -> None:
    (tmp_path / "file").write_text("")
    assert finish(make_engine(GameCache(tmp_path / "file" / "below")), game_files[0])[-1][2]


def test_environments_share_loaded_games_and_not_their_state(cache: GameCache, game_files: list[str]) -> None:
    first, second = make_engine(cache), make_engine(cache)
    expected = finish(first, game_files[4])
    second.load(game_files[4])
    start = record(second.reset())
    first.load(game_files[4])
    first.reset()
    for command in json.loads(Path(game_files[4]).read_text())["walkthrough"][:-1]:
        first.step(command)
    assert record(second.reset()) == start == expected[0]
    assert record(first.reset()) == start
    assert finish(second, game_files[4]) == expected


def test_a_forgotten_game_is_loaded_again(game_files: list[str]) -> None:
    engine = make_engine(GameCache(capacity=1))
    expected = [finish(engine, path) for path in game_files[:2]]
    assert [finish(engine, path) for path in game_files[:2]] == expected


def test_a_closed_environment_hands_its_planner_on(cache: GameCache, game_files: list[str]) -> None:
    first = make_engine(cache)
    expected = finish(first, game_files[0])
    library = first.downward_lib
    first.close()
    first.close()
    second, third = make_engine(cache), make_engine(cache)
    assert second.downward_lib is library
    assert third.downward_lib is not library
    assert finish(second, game_files[0]) == expected


def test_translating_leaves_the_process_as_it_was(
    cache: GameCache, solved: list[tuple[GeneratedGame, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["spear", "fit"])
    output = sys.stdout
    cache.prepare(solved[0][0].entries)
    assert sys.argv == ["spear", "fit"]
    assert sys.stdout is output
    assert gc.isenabled()


def test_the_planner_finds_no_plan_where_there_is_none(solved: list[tuple[GeneratedGame, list[str]]]) -> None:
    game, walkthrough = solved[0]
    # Nothing can be picked up any more.
    lines = [line for line in game.problem.splitlines() if not line.startswith("(pickupable ")]
    impossible = {**game.entries, "pddl_problem": "\n".join(lines)}
    assert list(solve(GameCache(), [game.entries, impossible, game.entries])) == [walkthrough, [], walkthrough]
    with pytest.raises(UnsolvableGameError, match=r"some file: .*goal cannot be reached"):
        GameCache().prepare(impossible, "some file")


def test_pddl_that_cannot_be_read_is_named(cache: GameCache, tmp_path: Path, game_files: list[str]) -> None:
    game = json.loads(Path(game_files[0]).read_text())
    for key, text in (("pddl_problem", "(define (problem"), ("pddl_domain", ""), ("grammar", "action {")):
        path = tmp_path / f"{key}.tw-pddl"
        path.write_text(json.dumps({**game, key: text}))
        with pytest.raises(ValueError, match=f"{path.name}: ALFWorld cannot read this game"):
            make_engine(cache).load(str(path))

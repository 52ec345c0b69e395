"""TextWorld's challenges on the real engine: two small games, made once for all tests here."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from gymnasium.error import ResetNeeded

pytest.importorskip("textworld")

from spear_lightning.environments import textworld_games
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.environments.textworld import TextWorld, TextWorldEnv

COOKING = {"recipe": 1, "take": 1, "open": True, "cook": True}


@pytest.fixture(scope="module")
def cooking(tmp_path_factory: pytest.TempPathFactory) -> TextWorld:
    """One game, in one kitchen, with a score of four."""
    suite = TextWorld("cooking", COOKING, train=1, max_steps=20, cache_dir=str(tmp_path_factory.mktemp("textworld")))
    suite.tasks("train")
    return suite


@pytest.fixture
def env(cooking: TextWorld) -> Any:
    env = cooking.make()
    yield env
    env.close()


def walkthrough(suite: TextWorld, task: str) -> list[str]:
    game: list[str] = json.loads((suite.games.path / task / "game.json").read_text())["metadata"]["walkthrough"]
    return game


def play(env: TextWorldEnv, commands: list[str], task: str = "train-0") -> list[Any]:
    return [env.reset(seed=5, options={"task": task}), *map(env.step, commands)]


def test_the_walkthrough_wins_and_pays_once(cooking: TextWorld, env: TextWorldEnv) -> None:
    (text, info), *steps = play(env, walkthrough(cooking, "train-0"))
    assert info["task"].startswith("You are hungry!")
    assert info["task_type"] == "cooking"
    assert "-= Kitchen =-" in text
    assert "inventory" in info["admissible_actions"]
    assert "-= Kitchen =-" in info["anchor"]
    assert "You are carrying" in info["anchor"]
    assert [reward for _, reward, *_ in steps] == [0] * (len(steps) - 1) + [1]
    assert [terminated for _, _, terminated, _, _ in steps] == [False] * (len(steps) - 1) + [True]
    assert [info["won"] for *_, info in steps] == [False] * (len(steps) - 1) + [True]
    with pytest.raises(ResetNeeded):
        env.step("look")


def test_score_gains_add_up_to_one(cooking: TextWorld) -> None:
    env = TextWorldEnv(cooking.games.path, "cooking", reward="score")
    _, *steps = play(env, walkthrough(cooking, "train-0"))
    assert sum(reward for _, reward, *_ in steps) == pytest.approx(1)
    assert sum(reward > 0 for _, reward, *_ in steps) == 4
    env.close()


def test_observations_are_the_games_own_words_only(cooking: TextWorld, env: TextWorldEnv) -> None:
    (text, _), *steps = play(env, walkthrough(cooking, "train-0"))
    for seen in (text, *(step[0] for step in steps)):
        assert not any(mark in seen for mark in ("$$", ">", "RESTART", "\n\n\n", "<score>", "  "))
        assert seen == seen.strip() != ""


def test_a_spoilt_meal_is_lost_not_won(env: TextWorldEnv, cooking: TextWorld) -> None:
    commands = walkthrough(cooking, "train-0")
    (cook,) = (number for number, command in enumerate(commands) if command.startswith("cook "))
    *_, last = play(env, [*commands[: cook + 1], commands[cook]])  # cooked twice: burnt
    text, reward, terminated, truncated, info = last
    assert "You lost!" in text
    assert (reward, terminated, truncated, info["won"]) == (0, True, False, False)


@pytest.mark.parametrize(
    "action",
    [
        *(
            "",
            " \n\t",
            "take " * 50_000,
            "喰\ud800\x00\u202e",
            ">",
            "%s{0}\\",
            "take",
            "go up",
            "look\nquit",
            "look. quit",
        ),
        *("quit", "restart", "undo", "save", "script", "tw-extra-infos score", "tw-trace-actions"),
    ],
)
def test_whatever_is_not_admissible_changes_nothing(
    action: str, env: TextWorldEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (_, before), (text, reward, terminated, truncated, after), look = play(env, [action, " LOOK \n"])
    assert (text, reward, terminated, truncated) == ("Nothing happens.", 0, False, False)
    assert after == before
    assert "-= Kitchen =-" in look[0]
    assert list(tmp_path.iterdir()) == []


def test_other_games_can_follow(cooking: TextWorld, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(cooking.games.path / "train-0", tmp_path / name)
    env, commands = TextWorldEnv(tmp_path, "cooking"), walkthrough(cooking, "train-0")
    first = play(env, commands, "a")
    assert play(env, commands[:3], "b") == first[:4]  # in the middle of which
    assert play(env, commands, "a") == first
    env.close()
    with pytest.raises(ResetNeeded):
        env.step("look")
    assert play(env, commands, "b") == first
    env.close()


def test_steps_beyond_the_limit_truncate(cooking: TextWorld) -> None:
    env = TextWorldEnv(cooking.games.path, "cooking", max_steps=2)
    _, first, second = play(env, ["look", "dance"])
    assert [first[3], second[3]] == [False, True]
    assert not second[2]
    env.close()


def test_games_of_one_seed_are_the_same_everywhere(cooking: TextWorld, env: TextWorldEnv, tmp_path: Path) -> None:
    again = TextWorld("cooking", COOKING, train=1, cache_dir=str(tmp_path))
    context = multiprocessing.get_context("spawn")  # with other hash seeds
    makers = [context.Process(target=again.tasks, args=("train",)) for _ in range(2)]  # at once
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0]
    assert sorted(file.name for file in again.games.path.rglob("*")) == [
        "game.json",
        "game.z8",
        "train-0",
        "train-0.lock",
    ]
    commands = walkthrough(cooking, "train-0")
    assert walkthrough(again, "train-0") == commands
    other = again.make()
    assert play(other, commands) == play(env, commands) == play(env, commands)  # also when played again
    other.close()


def test_the_pool_plays_it(cooking: TextWorld) -> None:
    with EnvironmentPool(pickle.loads(pickle.dumps(cooking)), workers=1) as pool:
        observations = pool.reset(dict.fromkeys((0, 1), cooking.tasks("train")[0]))
        for command in walkthrough(cooking, "train-0"):
            observations = pool.step({0: command, 1: "look"})
    assert (observations[0].won, observations[0].reward, observations[1].won) == (True, 1, False)


def test_seeds_of_splits_and_further_tries_are_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def note(self: textworld_games.GameFolder, seed: int, folder: Path) -> None:
        seeds.append(seed)
        (folder / textworld_games.GAME_FILE).touch()

    monkeypatch.setattr(textworld_games.GameFolder, "_write", note)
    suite = TextWorld("simple", train=6, validation=5, test=4, cache_dir=str(tmp_path))
    suite.prepare()
    tries = {seed + number * textworld_games.MOST_GAMES for seed in seeds for number in range(textworld_games._TRIES)}
    assert len(tries) == 15 * textworld_games._TRIES
    assert [task.id for task in suite.tasks("test")] == [f"test-{number}" for number in range(4)]
    # More games of the same settings are added; other settings have games of their own.
    TextWorld("simple", train=8, validation=5, test=4, cache_dir=str(tmp_path)).prepare()
    assert len(seeds) == 17
    TextWorld("simple", {"goal": "brief"}, train=1, cache_dir=str(tmp_path)).tasks("train")
    assert len(seeds) == 18


def test_many_games_are_made_by_processes(cooking: TextWorld, tmp_path: Path, capfd: Any) -> None:
    cooking.games._make_together(["train-0"], "games")  # there already
    wrong = textworld_games.GameFolder(tmp_path, "coin_collector", {"level": 301}, {})
    with pytest.raises(ValueError, match=r"\[1-300\]"):
        wrong._make_together(["test-0", "test-1"], "games of a kind")
    assert "making 2 games of a kind, once" in capfd.readouterr().err


def test_a_map_without_room_for_the_quest_is_drawn_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import textworld.challenges
    import textworld.generator

    tried: list[int] = []

    def picky(settings: dict[str, Any], options: Any) -> None:
        tried.append(settings["level"])
        raise textworld.generator.QuestGenerationError("no room")

    entry = textworld.challenges.CHALLENGES["tw-treasure_hunter"]
    monkeypatch.setitem(textworld.challenges.CHALLENGES, "tw-treasure_hunter", (entry[0], picky, entry[2]))
    with pytest.raises(ValueError, match="none of 50 maps has room"):
        TextWorld("treasure_hunter", {"level": 3}, cache_dir=str(tmp_path)).tasks("train")
    assert tried == [3] * 50
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"challenge": "chess"}, "one of coin_collector, treasure_hunter, cooking, simple, not chess"),
        ({"reward": "steps"}, "reward must be"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"train": 0}, "train must be at least 1 and at most"),
        ({"test": 1_000_001}, "test must be at least 1 and at most"),
    ],
)
def test_bad_arguments_are_named_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextWorld(**arguments)


@pytest.mark.parametrize(
    ("challenge", "settings", "grammar", "message"),
    [
        ("coin_collector", {}, {}, "required: --level"),
        ("coin_collector", {"level": 301}, {}, r"\[1-300\]"),
        ("coin_collector", {"level": "five"}, {}, "invalid int value: 'five'"),
        ("coin_collector", {"level": 2, "lvl": 3}, {}, r"unrecognized arguments: --lvl=3 \(usage: .*--level LEVEL"),
        ("cooking", {"go": 7}, {}, "invalid choice: 7"),
        ("cooking", {"recipe": 0}, {}, "recipe must have"),
        ("cooking", {"cook": "yes"}, {}, "--cook"),
        ("coin_collector", {"level": 2}, {"tone": "grim"}, "grammar has no 'tone'; it has theme, "),
    ],
)
def test_what_textworld_does_not_take_is_named(
    challenge: Any, settings: dict[str, Any], grammar: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TextWorld(challenge, settings, grammar, cache_dir=str(tmp_path)).prepare()


def test_textworld_missing_names_the_command(cooking: TextWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_lightning.environments.base.find_spec", lambda name: None)
    for use in (TextWorld().prepare, TextWorld().make):
        with pytest.raises(ValueError, match=r"pip install 'spear-lightning\[alfworld\]'"):
            use()


def test_unknown_games_and_unwritable_caches_are_named(env: TextWorldEnv, tmp_path: Path) -> None:
    for options in ({}, {"task": "train-9"}):
        with pytest.raises(ValueError, match=r"id of TextWorld.tasks"):
            env.reset(options=options)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set cache_dir"):
        TextWorld(cache_dir=str(tmp_path / "file")).prepare()

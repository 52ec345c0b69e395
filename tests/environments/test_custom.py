from __future__ import annotations

import gymnasium
import pytest

from spear_lightning.environments.custom import GymnasiumSuite
from spear_lightning.environments.pool import EnvironmentPool

COUNTDOWN = "tests.environments.tiny_environments.Countdown"


def test_environment_by_class_path_plays_in_the_pool() -> None:
    suite = GymnasiumSuite(COUNTDOWN, {"start": 1}, {"train": 3})
    with EnvironmentPool(suite, workers=1) as pool:
        answers = pool.reset(dict(enumerate(suite.tasks("train"))))
        assert [answers[slot].text.split(":")[0] for slot in range(3)] == ["train-0", "train-1", "train-2"]
        assert all(int(answer.anchor) in (1, 2, 3) for answer in answers.values())


def test_registered_environment_plays() -> None:
    gymnasium.register("TinyCountdown-v0", COUNTDOWN.replace(".Countdown", ":Countdown"))
    environment = GymnasiumSuite("TinyCountdown-v0", {"start": 2}).make()
    text, info = environment.reset(seed=3, options={"task": "a"})
    assert text.startswith("a: ")
    assert environment.step("\ud800 anything")[0].endswith("anything")
    assert info["admissible_actions"] == ["down", "up"]


def test_splits_are_disjoint_and_held_out_tasks_do_not_move() -> None:
    small, large = (
        GymnasiumSuite(COUNTDOWN, tasks={"train": train, "validation": 5, "test": 5}) for train in (10, 1000)
    )
    seeds = [task.seed for split in ("train", "validation", "test") for task in large.tasks(split)]
    assert len(set(seeds)) == 1010
    assert small.tasks("test") == large.tasks("test")
    assert small.tasks("validation") == large.tasks("validation")


def test_configuration_errors_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"tasks: unknown split 'eval'"):
        GymnasiumSuite(COUNTDOWN, tasks={"eval": 3})
    with pytest.raises(ValueError, match=r"tasks.train must be between"):
        GymnasiumSuite(COUNTDOWN, tasks={"train": -1})
    with pytest.raises(ValueError, match=r"has no test tasks: set environment.init_args.tasks.test"):
        GymnasiumSuite(COUNTDOWN, tasks={"train": 1}).tasks("test")
    with pytest.raises(ValueError, match=r"env: cannot import 'no_such_package.Maze'"):
        GymnasiumSuite("no_such_package.Maze").make()
    with pytest.raises(ValueError, match=r"env: cannot import .*Missing"):
        GymnasiumSuite(COUNTDOWN.replace("Countdown", "Missing")).make()
    with pytest.raises(ValueError, match=r"env: 'NoSuchGame-v0' is neither an import path"):
        GymnasiumSuite("NoSuchGame-v0").make()
    with pytest.raises(ValueError, match=r"makes a str, not a gymnasium.Env"):
        GymnasiumSuite(COUNTDOWN.replace("Countdown", "not_an_environment")).make()

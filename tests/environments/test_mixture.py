"""Several environments in one run: shares, names, and each task played by its own environment."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from jsonargparse import ArgumentParser

from spear_lightning.environments.base import TaskSuite
from spear_lightning.environments.custom import GymnasiumSuite
from spear_lightning.environments.mixture import Mixture, belongs
from spear_lightning.environments.pool import EnvironmentPool

COUNTDOWN = "tests.environments.tiny_environments.Countdown"


def suite(start: int, **tasks: int) -> GymnasiumSuite:
    return GymnasiumSuite(COUNTDOWN, {"start": start}, tasks)


def of(mixture: Mixture, split: str) -> Counter[str]:
    return Counter(task.id.partition("/")[0].partition("#")[0] for task in mixture.tasks(split))  # type: ignore[arg-type]


def test_shares_are_those_of_the_weights_and_no_task_is_left_out():
    environments = {"few": suite(1, train=10, test=3), "many": suite(9, train=60, test=5)}
    equal = Mixture(environments)
    assert of(equal, "train") == {"few": 60, "many": 60}
    assert of(Mixture(environments, {"few": 1, "many": 3}), "train") == {"few": 20, "many": 60}
    assert of(Mixture(environments, {"few": 1, "many": 30}), "train") == {"few": 10, "many": 300}
    ids = [task.id for task in equal.tasks("train")]
    assert len(set(ids)) == 120, "equal ids would draw equal random numbers"
    assert of(equal, "test") == {"few": 3, "many": 5}, "held-out tasks are played once, whatever the weights"
    assert [task.task_type for task in equal.tasks("test")][:3] == ["few", "many", "few"]


def test_each_task_is_played_by_its_own_environment():
    mixture = pickle.loads(pickle.dumps(Mixture({"few": suite(1, train=2), "many": suite(50, train=4)})))
    tasks = mixture.tasks("train")
    with EnvironmentPool(mixture, workers=1) as pool:
        for task, answer in zip(tasks, pool.reset(dict(enumerate(tasks))).values(), strict=True):
            left = int(answer.anchor)
            assert (left < 10) == task.id.startswith("few")
            assert answer.text.startswith(f"{task.id.partition('/')[2]}: "), "the environment sees its own id"
        pool.reset({0: tasks[1]})
        assert int(pool.step({0: "down"})[0].anchor) > 10, "a slot may change its environment"


def test_the_same_task_again_is_another_group_of_the_same_task():
    mixture = Mixture({"few": suite(1, train=1), "many": suite(1, train=2)})
    first, again = (task for task in mixture.tasks("train") if task.id.startswith("few"))
    assert (first.id, again.id) == ("few/train-0", "few#1/train-0")
    environment = mixture.make()
    texts = [environment.reset(seed=task.seed, options={"task": task.id})[0] for task in (first, again)]
    assert texts[0] == texts[1]
    environment.close()


def test_mistakes_are_named():
    for environments, weights, message in (
        ({}, None, "is empty"),
        ({"a/b": suite(1)}, None, "'a/b' cannot be a name"),
        ({"a": suite(1)}, {"b": 1.0}, "each of a a number above 0"),
        ({"a": suite(1)}, {"a": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(environments, weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'a' of the mixture: .* no test tasks"):
        Mixture({"a": suite(1, train=3)}).tasks("test")
    assert belongs("house/heat", "house")
    assert not belongs("houses", "house")


def test_it_is_composed_in_a_configuration():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--environment", type=TaskSuite)
    one = {"class_path": "GymnasiumSuite", "init_args": {"env": COUNTDOWN, "tasks": {"train": 2}}}
    arguments = {"environments": {"one": one, "two": one}, "weights": {"one": 1, "two": 2}}
    given = {"class_path": "Mixture", "init_args": arguments}
    made = parser.instantiate_classes(parser.parse_object({"environment": given})).environment
    assert of(made, "train") == {"one": 2, "two": 4}

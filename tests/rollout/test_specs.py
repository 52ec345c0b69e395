from __future__ import annotations

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from spear_lightning.environments.base import Task
from spear_lightning.rollout.specs import (
    Evaluation,
    TrainingRollouts,
    check_enough_tasks,
    evaluation_specs,
    training_specs,
)

TASKS = [Task(id=f"game-{number}") for number in range(10)]


def played(iteration, rank=0, world_size=1, seed=3, tasks=3):
    rollouts = TrainingRollouts(tasks=tasks, group_size=2)
    return training_specs(TASKS, rollouts, seed=seed, iteration=iteration, rank=rank, world_size=world_size)


def test_a_pass_visits_no_task_twice_and_the_next_has_another_order():
    first = [spec.task.id for iteration in range(3) for spec in played(iteration) if spec.index == 0]
    second = [spec.task.id for iteration in range(3, 6) for spec in played(iteration) if spec.index == 0]
    assert len(set(first)) == 9 == len(set(second))
    assert first != second
    assert first != [spec.task.id for iteration in range(3) for spec in played(iteration, seed=4) if spec.index == 0]


def test_ranks_share_the_groups_and_never_split_one():
    whole = {(spec.group, spec.index, spec.task.id) for spec in played(1)}
    parts = [{(spec.group, spec.index, spec.task.id) for spec in played(1, rank, 2)} for rank in range(2)]
    assert parts[0] | parts[1] == whole
    assert {group for group, _, _ in parts[0]}.isdisjoint({group for group, _, _ in parts[1]})


def resampled(iteration, groups, rank=0, world_size=1, seed=3):
    rollouts = TrainingRollouts(tasks=3, group_size=2, resample=2)
    where = {"rank": rank, "world_size": world_size}
    return training_specs(TASKS, rollouts, seed=seed, iteration=iteration, groups=groups, **where)


def test_further_rounds_take_other_tasks_whatever_the_rounds():
    first, rest = played(1), resampled(1, range(3, 9))
    tasks = {spec.group: spec.task.id for spec in first + rest}
    assert sorted(tasks) == list(range(9))
    assert len(set(tasks.values())) == 9
    assert resampled(1, range(3, 5)) + resampled(1, range(5, 9)) == rest, "who is missing does not move the others"
    others = [[spec.task.id for spec in resampled(i, range(3, 9), seed=s)] for i, s in ((1, 3), (1, 4), (4, 3))]
    assert others[0] != others[1]
    assert others[0] != others[2], "another pass, another order"
    assert [spec.task.id for spec in resampled(0, range(3, 9))] != others[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("groups", [range(3, 6), range(4, 9), range(5, 6)])
def test_a_further_round_is_dealt_evenly_and_is_the_same_on_any_number_of_ranks(groups, world_size):
    parts = [resampled(1, groups, rank, world_size) for rank in range(world_size)]
    counts = [len({spec.group for spec in part}) for part in parts]
    assert max(counts) - min(counts) <= 1
    whole = sorted((spec for part in parts for spec in part), key=lambda spec: (spec.group, spec.index))
    assert whole == resampled(1, groups)


def test_a_split_that_resampling_could_exhaust_is_refused():
    check_enough_tasks(TASKS, TrainingRollouts(tasks=5, resample=1))
    with pytest.raises(MisconfigurationException, match=r"tasks is 5 and .*resample 2, which may take 15 .* only 10"):
        check_enough_tasks(TASKS, TrainingRollouts(tasks=5, resample=2))
    with pytest.raises(
        MisconfigurationException, match="tasks is 11, but the training split has only 10 tasks: lower it"
    ):
        check_enough_tasks(TASKS, TrainingRollouts(tasks=11))


def test_evaluation_plays_every_attempt_once_in_as_many_batches_on_every_rank():
    evaluation = Evaluation(episodes_per_task=2, batch=4, tasks=7)
    parts = [evaluation_specs(TASKS, evaluation, rank=rank, world_size=3) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    keys = [(spec.task.id, spec.index) for part in parts for batch in part for spec in batch]
    assert sorted(keys) == sorted((f"game-{number}", index) for number in range(7) for index in range(2))

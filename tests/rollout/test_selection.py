from __future__ import annotations

from spear_lightning.environments.base import Task
from spear_lightning.rollout.selection import evaluation_specs, training_specs
from spear_lightning.rollout.settings import Evaluation, TrainingRollouts

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


def test_evaluation_plays_every_attempt_once_in_as_many_batches_on_every_rank():
    evaluation = Evaluation(episodes_per_task=2, batch=4, tasks=7)
    parts = [evaluation_specs(TASKS, evaluation, rank=rank, world_size=3) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    keys = [(spec.task.id, spec.index) for part in parts for batch in part for spec in batch]
    assert sorted(keys) == sorted((f"game-{number}", index) for number in range(7) for index in range(2))

"""Which tasks an iteration or an evaluation plays, and on which rank: a function of names, not of what went before."""

from __future__ import annotations

from collections.abc import Sequence

from spear_lightning.environments.base import Task
from spear_lightning.randomness import stream_seed
from spear_lightning.rollout.collector import EpisodeSpec
from spear_lightning.rollout.settings import Evaluation, TrainingRollouts


def training_specs(
    tasks: Sequence[Task], rollouts: TrainingRollouts, *, seed: int, iteration: int, rank: int, world_size: int
) -> list[EpisodeSpec]:
    """The episodes that ``rank`` plays in ``iteration``.

    Tasks are visited in shuffled passes: every task once per pass (but for the rest that does not fill an iteration),
    in an order keyed by (seed, pass). Whole groups are dealt over ranks, so that a group never spans two.

    Args:
        tasks: of the training split, at least ``rollouts.tasks``.
        rollouts: B and G.
        seed: of the run.
        iteration: from 0.
        rank: of this process.
        world_size: number of processes.
    """
    per_pass = len(tasks) // rollouts.tasks
    number, position = divmod(iteration, per_pass)
    order = sorted(tasks, key=lambda task: stream_seed("order", seed, number, task.id))
    chosen = order[position * rollouts.tasks : (position + 1) * rollouts.tasks]
    return [
        EpisodeSpec(task=task, group=group, index=index)
        for group, task in enumerate(chosen)
        if group % world_size == rank
        for index in range(rollouts.group_size)
    ]


def evaluation_specs(
    tasks: Sequence[Task], evaluation: Evaluation, *, rank: int, world_size: int
) -> list[list[EpisodeSpec]]:
    """The batches of episodes that ``rank`` plays; every rank has the same number of batches.

    Args:
        tasks: of a held-out split.
        evaluation: how many tasks and attempts.
        rank: of this process.
        world_size: number of processes.
    """
    everything = [
        EpisodeSpec(task=task, group=group, index=index)
        for group, task in enumerate(tasks[: evaluation.tasks])
        for index in range(evaluation.episodes_per_task)
    ]
    mine = everything[rank::world_size]
    most = -(-len(everything) // world_size)
    return [mine[start : start + evaluation.batch] for start in range(0, most, evaluation.batch)]

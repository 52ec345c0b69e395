"""Which tasks an iteration or an evaluation plays, and on which rank: a function of names, not of what went before."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from spear_lightning.environments.base import Task
from spear_lightning.rollout.collector import EpisodeSpec
from spear_lightning.rollout.settings import Evaluation, TrainingRollouts
from spear_lightning.utils.randomness import stream_seed


def check_enough_tasks(tasks: Sequence[Task], rollouts: TrainingRollouts) -> None:
    """Refuse a training split that an iteration could exhaust.

    Args:
        tasks: of the training split.
        rollouts: B, and how often missing groups are resampled.

    Raises:
        MisconfigurationException: there are too few tasks; names the keys and numbers.
    """
    needed = rollouts.tasks * (1 + rollouts.resample)
    if len(tasks) < needed:
        rounds = f" and data.rollouts.resample {rollouts.resample}, which may take {needed} tasks an iteration"
        raise MisconfigurationException(
            f"data.rollouts.tasks is {rollouts.tasks}{rounds if rollouts.resample else ''}, but the training split has "
            f"only {len(tasks)} tasks: lower {'one of them' if rollouts.resample else 'it'}, or give data.environment "
            "more training tasks"
        )


def training_specs(
    tasks: Sequence[Task],
    rollouts: TrainingRollouts,
    iteration: int,
    *,
    seed: int,
    rank: int,
    world_size: int,
    groups: range | None = None,
) -> list[EpisodeSpec]:
    """The episodes that ``rank`` plays in ``iteration``, or in one round of it.

    Tasks are visited in shuffled passes: every task once per pass (but for the rest that does not fill an iteration),
    in an order keyed by (seed, pass). Groups from B on, which replace others, get the rest of the split in an order
    keyed by (seed, iteration), so that the tasks of an iteration are all different. Whole groups are dealt over ranks,
    so that a group never spans two.

    Args:
        tasks: of the training split, at least as many as :func:`check_enough_tasks` asks for.
        rollouts: B and G.
        iteration: from 0.
        seed: of the run.
        rank: of this process.
        world_size: number of processes.
        groups: numbers of the groups that are played; ``None`` for the first B.
    """
    groups = groups or range(rollouts.tasks)
    per_pass = len(tasks) // rollouts.tasks
    number, position = divmod(iteration, per_pass)
    order = sorted(tasks, key=lambda task: stream_seed("order", seed, number, task.id))
    start, stop = position * rollouts.tasks, (position + 1) * rollouts.tasks
    chosen = order[start:stop]
    if groups.stop > rollouts.tasks:
        rest = order[:start] + order[stop:]
        chosen += sorted(rest, key=lambda task: stream_seed("resample", seed, iteration, task.id))
    return [
        EpisodeSpec(task=chosen[group], group=group, index=index)
        for group in groups
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

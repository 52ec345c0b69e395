"""Which tasks an iteration or an evaluation plays, and on which rank: a function of names, not of what went before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException

from spear_lightning.environments.base import Task
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import AtLeast0, NotNegative, Positive, Share, in_range


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """An episode to be played.

    Attributes:
        task: to attempt.
        group: number of the task within the iteration.
        index: number of the episode within its group.
    """

    task: Task
    group: int
    index: int


@in_range
@dataclass(frozen=True)
class TrainingRollouts:
    """How an iteration's episodes are played.

    Args:
        tasks: B, tasks per iteration over all ranks.
        group_size: G, episodes per task.
        temperature: of the softmax that tokens are drawn from.
        top_p: must be 1. Any truncation draws from another distribution than the one whose log-probabilities are
            stored, and the importance ratio would be wrong.
        top_k: must be 0, for the same reason.
        max_staleness: 0 plays an iteration with the weights that it will train. 1 plays the next iteration while this
            one trains, so with weights that are one iteration old from the second iteration on; importance ratios are
            taken against the log-probabilities it was played with. More would only be older: one engine plays one
            iteration at a time.
        resample: most further rounds of an iteration (DAPO's dynamic sampling), in which groups whose episodes all got
            the same reward are replaced by groups of fresh tasks. An iteration may then take
            ``tasks * (1 + resample)`` tasks; it learns from B groups at most.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    tasks: Positive = 8
    group_size: Positive = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_staleness: int = 0
    resample: NotNegative = 0

    def __post_init__(self) -> None:
        if self.max_staleness not in (0, 1):
            raise ValueError(
                f"data.rollouts.max_staleness must be 0 (strictly on-policy) or 1 (the next iteration is played while "
                f"this one trains), not {self.max_staleness}"
            )
        if self.resample and self.max_staleness:
            raise ValueError(
                f"data.rollouts.resample is {self.resample} and data.rollouts.max_staleness 1, but who plays ahead "
                "cannot know yet which groups will be missing: set max_staleness to 0, or resample to 0"
            )
        if self.resample and self.group_size == 1:
            raise ValueError(
                f"data.rollouts.resample is {self.resample} and data.rollouts.group_size 1, but the reward of a single "
                "episode never differs from itself, so every group would be replaced: raise group_size, or set "
                "resample to 0"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"data.rollouts.temperature must be above 0, not {self.temperature}: "
                "greedy episodes have no importance ratio; use data.evaluation.temperature for greedy evaluation"
            )
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"data.rollouts.top_p={self.top_p}, top_k={self.top_k}: truncated sampling in training would make the "
                "importance ratio wrong; leave top_p at 1 and top_k at 0 (both are allowed in data.evaluation)"
            )


@in_range
@dataclass(frozen=True)
class Evaluation:
    """How held-out tasks are played by ``validate``, ``test`` and ``predict``.

    Args:
        temperature: of the softmax; 0 is greedy.
        top_p: nucleus; 1 keeps everything.
        top_k: number of tokens kept; 0 keeps everything.
        episodes_per_task: attempts at each task.
        tasks: how many tasks of the split are played, the first ones in its order; ``None`` takes all.
        batch: episodes played together.

    """

    temperature: AtLeast0 = 1.0
    top_p: Share = 1.0
    top_k: NotNegative = 0
    episodes_per_task: Positive = 1
    tasks: Positive | None = None
    batch: Positive = 128


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

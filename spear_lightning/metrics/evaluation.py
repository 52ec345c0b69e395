"""Summaries of episodes: success, reward, score, effort, pass@k and maj@k, with intervals.

A Wilson interval takes episodes as independent. Those of one task are not, so a summary's intervals resample tasks.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from spear_lightning.distributed.collectives import concatenate, gather
from spear_lightning.metrics.intervals import bootstrap, pass_at_k, wilson
from spear_lightning.rollout.episode import Episode, Rollout


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """What is kept of an episode that was played to an end.

    Attributes:
        task: its id.
        task_type: of the task, may be empty.
        success: whether it was solved.
        score: sum of the environment's rewards.
        answer: what was answered, where the task asks for an answer; else empty.
        turns: number of turns.
        tokens: generated tokens.
        tool_calls: turns that used a tool or acted on the environment.
        invalid: turns whose response did not have the required form.
        reward: the composed reward R.
        entropies: of the turns, each the sum over the generated tokens whose entropy is known, in nats.
        known: number of these tokens.
    """

    task: str
    task_type: str
    success: bool
    score: float
    answer: str
    turns: int
    tokens: int
    tool_calls: int
    invalid: int
    reward: float = math.nan
    entropies: tuple[float, ...] = ()
    known: int = 0

    @classmethod
    def of(cls, episode: Episode) -> EpisodeRecord:
        """The record of an episode."""
        known = [turn.entropies[~np.isnan(turn.entropies)] for turn in episode.turns]
        return cls(
            task=episode.task.id,
            task_type=episode.task.task_type,
            success=episode.success,
            score=float(episode.score),
            answer=episode.answer,
            turns=len(episode.turns),
            tokens=episode.generated_tokens,
            tool_calls=episode.tool_calls,
            invalid=episode.invalid,
            reward=episode.reward,
            entropies=tuple(float(values.sum(dtype=np.float64)) for values in known),
            known=sum(map(len, known)),
        )


class Rate(NamedTuple):
    """Successes among episodes."""

    successes: int
    episodes: int

    @property
    def share(self) -> float:
        """Share of episodes that succeeded; NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson interval of the share."""
        return wilson(*self, confidence)

    @classmethod
    def of(cls, records: Sequence[EpisodeRecord]) -> Rate:
        """The rate of some episodes."""
        return cls(sum(record.success for record in records), len(records))


@dataclass
class Results:
    """Episodes of a rank, of the parts of a phase, or of all ranks.

    Attributes:
        records: of those that were played to an end.
        aborted: number of those whose environment failed.
    """

    records: list[EpisodeRecord] = field(default_factory=list)
    aborted: int = 0

    def add(self, rollout: Rollout) -> Results:
        """Take the episodes of this rank."""
        self.records += map(EpisodeRecord.of, rollout.episodes)
        self.aborted += len(rollout.aborted)
        return self

    def over_ranks(self) -> Results:
        """The episodes of all ranks. Every rank must call it."""
        return Results(concatenate(self.records), sum(gather(self.aborted)))

    @property
    def success(self) -> Rate:
        """Of all episodes."""
        return Rate.of(self.records)

    @property
    def by_type(self) -> dict[str, Rate]:
        """Success by task type."""
        types = sorted({record.task_type for record in self.records})
        return {name: Rate.of([record for record in self.records if record.task_type == name]) for name in types}

    @property
    def reward(self) -> float:
        """Mean composed reward per episode; NaN without episodes."""
        return math.fsum(record.reward for record in self.records) / len(self.records) if self.records else math.nan

    @property
    def entropy(self) -> float:
        """Mean policy entropy per generated token in nats; NaN where no token's entropy is known."""
        known = sum(record.known for record in self.records)
        return math.fsum(value for record in self.records for value in record.entropies) / known if known else math.nan


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """What a set of episodes amounts to.

    Attributes:
        episodes: played to an end.
        tasks: that they attempted.
        success: share of episodes that succeeded, averaged by task; with ``k`` attempts each this is avg@k.
        score: mean of the environments' own scores, averaged by task.
        attempts: k, the attempts that every task has; more may have been made at some.
        pass_at: probability that one of so many attempts succeeds, by their number (powers of two up to k).
        majority: maj@k, the share of tasks whose most frequent answer is right, where tasks ask for an answer; equally
            frequent answers count in equal parts.
        turns: mean per episode.
        tokens: generated, mean per episode.
        tool_calls: mean per episode.
        invalid: share of turns whose response did not have the required form.
    """

    episodes: int
    tasks: int
    success: Estimate
    score: Estimate
    attempts: int
    pass_at: dict[int, Estimate]
    majority: Estimate | None
    turns: float
    tokens: float
    tool_calls: float
    invalid: float


def summarize(records: Sequence[EpisodeRecord], confidence: float = 0.95) -> EvaluationSummary:
    """Sum up episodes.

    Args:
        records: at least one, in any order.
        confidence: two-sided coverage of the intervals, in (0, 1).

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("no episode was played to an end: there is nothing to sum up")
    attempts: dict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        attempts[record.task].append(record)
    tasks = [attempts[name] for name in sorted(attempts)]  # an order of their own, whatever rank played them
    k = min(len(task) for task in tasks)

    def over_tasks(value: Callable[[list[EpisodeRecord]], float]) -> Estimate:
        values = [value(task) for task in tasks]
        return Estimate(math.fsum(values) / len(values), *bootstrap(values, confidence))

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(records)

    return EvaluationSummary(
        episodes=len(records),
        tasks=len(tasks),
        success=over_tasks(lambda task: Rate.of(task).share),
        score=over_tasks(lambda task: math.fsum(record.score for record in task) / len(task)),
        attempts=k,
        pass_at={
            number: over_tasks(lambda task, number=number: pass_at_k(len(task), Rate.of(task).successes, number))  # type: ignore[misc]
            for number in (2**power for power in range(k.bit_length()))
            if k > 1
        },
        majority=over_tasks(majority) if k > 1 and any(record.answer for record in records) else None,
        turns=mean(record.turns for record in records),
        tokens=mean(record.tokens for record in records),
        tool_calls=mean(record.tool_calls for record in records),
        invalid=sum(record.invalid for record in records) / max(1, sum(record.turns for record in records)),
    )


def majority(attempts: Sequence[EpisodeRecord]) -> float:
    """Whether the most frequent answer to a task is right.

    Args:
        attempts: at one task.

    Returns:
        1 or 0; where several answers are equally frequent, the share of right ones among them. An attempt without an
        answer does not vote.
    """
    votes = Counter(record.answer for record in attempts if record.answer)
    most = max(votes.values(), default=0)
    right = [
        any(record.success for record in attempts if record.answer == answer)
        for answer, count in votes.items()
        if count == most
    ]
    return sum(right) / len(right) if right else 0.0

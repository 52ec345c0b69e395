"""From played episodes to scored ones: rewards, quality filters, group filter and advantages (algorithm.md §1.2–1.4).

Groups may lie on different ranks; what depends on all of them (which groups are kept, batch whitening) is computed from
a table that every rank gathers. The table holds a few numbers per turn, never tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spear_lightning.agents.base import Context
from spear_lightning.algorithm import (
    ZERO_DEVIATION,
    AdvantageEstimator,
    QualityFilters,
    RewardComposer,
    TurnTable,
    keep_groups,
)
from spear_lightning.distributed.collectives import concatenate, gather
from spear_lightning.rollout.episode import Episode


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Reward statistics of all groups of an iteration, over all ranks, in order of group; each ``(groups,)``.

    Attributes:
        means: mean of R over the episodes of the group, float64.
        deviations: what its advantages are divided by, float64; ones where the estimator does not divide.
        kept: whether it stays in the batch, bool.
    """

    means: np.ndarray
    deviations: np.ndarray
    kept: np.ndarray

    @classmethod
    def none(cls) -> GroupStatistics:
        """Of an iteration without groups."""
        return cls(np.zeros(0), np.zeros(0), np.zeros(0, bool))


def score_episode(
    episode: Episode, composer: RewardComposer, filters: QualityFilters, tool_reward_weight: float
) -> Episode:
    """Compose the reward of one episode and apply the quality filters to it, in place.

    In ``conversation`` context a filter takes out the whole episode; in ``stepwise`` context only the turns it applies
    to (each turn is a sample of its own).

    Args:
        episode: as played, not aborted.
        composer: makes R of its parts.
        filters: quality filters.
        tool_reward_weight: μ(t).

    Returns:
        The episode itself.
    """
    parts = composer.compose(
        success=episode.success,
        score=episode.score,
        tool_calls=episode.tool_calls,
        invalid_turns=[not turn.valid for turn in episode.turns],
        mu=tool_reward_weight,
    )
    flags = [
        filters.hits(turn.response_ids, turn.text, turn.finish, turn.action is not None, turn.tool_call)
        for turn in episode.turns
    ]
    if episode.reason == "overlong" and filters.overlong and flags:
        flags[-1] = flags[-1] | {"overlong"}
    found: frozenset[str] = frozenset().union(*flags) if flags else frozenset()
    clean = np.array([not flag for flag in flags], dtype=bool)
    if episode.context == "conversation":
        clean[:] = not found
    episode.reward = parts.total
    episode.parts = {"outcome": parts.outcome, "tool": parts.tool, "format": parts.format}
    episode.penalties, episode.step_rewards = parts.penalties, parts.step_rewards
    episode.filters, episode.keep = found, clean
    episode.advantages = np.zeros(len(episode.turns))
    return episode


def shares_filtered(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of episodes that each quality filter has taken out of the loss, whole; the commonest filter first.

    Args:
        episodes: of one iteration.
    """
    hits = Counter(name for episode in episodes if not episode.keep.any() for name in episode.filters)
    return {name: count / len(episodes) for name, count in hits.most_common()}


def groups_with_signal(episodes: Sequence[Episode]) -> set[int]:
    """Numbers of the groups, over all ranks, whose episodes did not all get the same R. Every rank must call it.

    Args:
        episodes: this rank's episodes, in whole groups.
    """
    rewards: dict[int, list[float]] = {}
    for episode in episodes:
        rewards.setdefault(episode.group, []).append(episode.reward)
    return set(concatenate(group for group, values in rewards.items() if _deviation(values) > ZERO_DEVIATION))


def estimate_advantages(
    episodes: Sequence[Episode], estimator: AdvantageEstimator, filters: QualityFilters, batch: int | None = None
) -> GroupStatistics:
    """Fill in group statistics, dropped groups and advantages, in place.

    Every rank must call it. Filtered episodes count in their group's baseline; a dropped group keeps its advantages
    (for the logs) and loses its loss mask. Groups are ranked by the deviation, over episodes, of R less the episode's
    mean penalty.

    Args:
        episodes: this rank's episodes.
        estimator: GRPO, GiGPO, …
        filters: whose ``keep_share`` says how many groups stay.
        batch: B, where others were sought in place of groups whose episodes all got the same R: such groups are then
            dropped, and estimated apart from those that are learned from. ``None`` estimates all groups together.
    """
    parts = gather([_Scores.of(episode) for episode in episodes])
    everything = sorted((row for part in parts for row in part), key=lambda row: (row.group, row.index))
    if not everything:
        return GroupStatistics.none()
    members: dict[int, list[_Scores]] = {}
    for row in everything:
        members.setdefault(row.group, []).append(row)
    means = {group: float(np.mean([row.reward for row in rows])) for group, rows in members.items()}
    stds = {group: _deviation([row.reward for row in rows]) for group, rows in members.items()}
    learned = [group for group in members if batch is None or stds[group] > ZERO_DEVIATION]
    worths = [_deviation([row.worth for row in members[group]]) for group in learned]
    kept = keep_groups(worths, learned, filters.keep_share, batch)
    of_episode: dict[tuple[int, int], np.ndarray] = {}
    deviations: dict[int, float] = {}
    for part in (learned, [group for group in members if group not in learned]):
        if part:
            rows = [row for group in part for row in members[group]]
            table, lengths = _table(rows)
            advantages = np.split(np.asarray(estimator(table), dtype=np.float64), np.cumsum(lengths)[:-1])
            of_episode.update(zip(((row.group, row.index) for row in rows), advantages, strict=True))
            deviations.update(zip(part, estimator.deviations(table), strict=True))
    for episode in episodes:
        group = episode.group
        episode.advantages = of_episode[group, episode.index][: len(episode.turns)]
        episode.group_mean, episode.group_std = means[group], stds[group]
        episode.group_kept, episode.in_batch = group in kept, group in learned
        if not episode.group_kept:
            episode.keep = np.zeros_like(episode.keep)
    return GroupStatistics(
        means=np.array([means[group] for group in members]),
        deviations=np.array([deviations[group] for group in members], dtype=np.float64),
        kept=np.array([group in kept for group in members]),
    )


@dataclass(frozen=True, slots=True)
class _Scores:
    """What all ranks must know of an episode: a few numbers a turn."""

    group: int
    index: int
    context: Context
    reward: float
    worth: float
    penalties: list[float]
    step_rewards: list[float]
    anchors: list[str]

    @classmethod
    def of(cls, episode: Episode) -> _Scores:
        return cls(
            group=episode.group,
            index=episode.index,
            context=episode.context,
            reward=episode.reward,
            worth=episode.worth(),
            penalties=episode.penalties.tolist() or [0.0],
            step_rewards=episode.step_rewards.tolist() or [episode.parts["outcome"]],
            anchors=[_digest(turn.anchor) for turn in episode.turns] or [""],
        )


def _table(everything: Sequence[_Scores]) -> tuple[TurnTable, list[int]]:
    """The table of all turns, and how many rows of it each episode has: at least one, which counts in the baseline."""
    lengths = [len(row.penalties) for row in everything]
    table = TurnTable(
        returns=np.repeat([row.reward for row in everything], lengths),
        penalties=np.concatenate([row.penalties for row in everything]),
        step_rewards=np.concatenate([row.step_rewards for row in everything]),
        groups=np.repeat([row.group for row in everything], lengths),
        episodes=np.repeat(np.arange(len(everything)), lengths),
        anchors=[anchor for row in everything for anchor in row.anchors],
        samples="turn" if everything[0].context == "stepwise" else "episode",
    )
    return table, lengths


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; exactly 0 where all values are equal."""
    return float(np.std(values, ddof=1)) if max(values) > min(values) else 0.0


def _digest(anchor: str) -> str:
    return hashlib.blake2b(anchor.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

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

from spear_lightning.algorithm.estimators import AdvantageEstimator, TurnTable
from spear_lightning.algorithm.filters import QualityFilters, keep_groups
from spear_lightning.algorithm.rewards import RewardComposer
from spear_lightning.distributed import gather
from spear_lightning.rollout.episode import Episode
from spear_lightning.rollout.scored import ScoredEpisode


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Reward statistics of all groups of an iteration, over all ranks, in order of group.

    Attributes:
        means: mean reward per group, float64 ``(groups,)``.
        stds: sample standard deviation per group (0 for a group of one), float64 ``(groups,)``.
        kept: number of groups that stay in the batch.
    """

    means: np.ndarray
    stds: np.ndarray
    kept: int


def score_episode(
    episode: Episode, composer: RewardComposer, filters: QualityFilters, tool_reward_weight: float
) -> ScoredEpisode:
    """Compose the reward of one episode and apply the quality filters to it.

    In ``conversation`` context a filter takes out the whole episode; in ``stepwise`` context only the turns it applies
    to (each turn is a training row of its own).

    Args:
        episode: as played, not aborted.
        composer: makes R of its parts.
        filters: quality filters.
        tool_reward_weight: μ(t).
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
    return ScoredEpisode(
        episode=episode,
        reward=parts.total,
        parts={"outcome": parts.outcome, "tool": parts.tool, "format": parts.format, "penalty": parts.penalty},
        turn_rewards=parts.turn_rewards,
        filters=found,
        keep=clean,
        advantages=np.zeros(len(episode.turns)),
    )


def shares_filtered(scored: Sequence[ScoredEpisode]) -> dict[str, float]:
    """Share of episodes that each quality filter has taken out of the loss, whole; the commonest filter first.

    Args:
        scored: of one iteration.
    """
    hits = Counter(name for item in scored if not item.keep.any() for name in item.filters)
    return {name: count / len(scored) for name, count in hits.most_common()}


def estimate_advantages(
    scored: Sequence[ScoredEpisode], estimator: AdvantageEstimator, filters: QualityFilters
) -> GroupStatistics:
    """Fill in group statistics, dropped groups and advantages, in place.

    Every rank must call it. Filtered episodes count in their group's baseline; a dropped group keeps its advantages
    (for the logs) and loses its loss mask.

    Args:
        scored: this rank's episodes.
        estimator: GRPO, GiGPO, …
        filters: whose ``keep_share`` says how many groups stay.
    """
    rows = [
        (
            item.episode.group,
            item.episode.index,
            item.reward,
            [float(reward) for reward in item.turn_rewards],
            [_digest(turn.anchor) for turn in item.episode.turns],
        )
        for item in scored
    ]
    parts = gather(rows)
    everything = sorted(row for part in parts for row in part)
    if not everything:
        return GroupStatistics(np.zeros(0), np.zeros(0), 0)

    rewards: dict[int, list[float]] = {}
    for group, _, reward, _, _ in everything:
        rewards.setdefault(group, []).append(reward)
    groups = sorted(rewards)
    means = np.array([np.mean(rewards[group]) for group in groups])
    stds = np.array([np.std(rewards[group], ddof=1) if len(rewards[group]) > 1 else 0.0 for group in groups])
    kept = keep_groups(stds, groups, filters.keep_share)

    # Episodes that never got to a turn count in the baseline of their group, but have no row in the table.
    lengths = [max(1, len(turns)) for _, _, _, turns, _ in everything]
    table = TurnTable(
        episode_rewards=np.repeat([row[2] for row in everything], lengths),
        step_rewards=np.concatenate([np.asarray(row[3] or [row[2]], dtype=np.float64) for row in everything]),
        groups=np.repeat([row[0] for row in everything], lengths),
        episodes=np.repeat(np.arange(len(everything)), lengths),
        anchors=[anchor for row in everything for anchor in (row[4] or [""])],
    )
    advantages = np.split(np.asarray(estimator(table), dtype=np.float64), np.cumsum(lengths)[:-1])
    of_episode = {row[:2]: values for row, values in zip(everything, advantages, strict=True)}
    for item in scored:
        group = item.episode.group
        position = groups.index(group)
        item.advantages = of_episode[group, item.episode.index][: len(item.episode.turns)]
        item.group_mean, item.group_std = float(means[position]), float(stds[position])
        item.group_kept = group in kept
        if not item.group_kept:
            item.keep = np.zeros_like(item.keep)
    return GroupStatistics(means=means, stds=stds, kept=len(kept))


def _digest(anchor: str) -> str:
    return hashlib.blake2b(anchor.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

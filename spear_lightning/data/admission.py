"""Scored episodes as training samples, as replay entries, and replay entries as training samples again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from spear_lightning.algorithm import ReplayBuffer, ReplayEntry, ReplaySample, RewardBaseline, is_admissible
from spear_lightning.data.samples import Sample, samples_of
from spear_lightning.data.scoring import GroupStatistics
from spear_lightning.data.token_pool import SampleStore
from spear_lightning.distributed.collectives import concatenate, gather
from spear_lightning.rollout.episode import Episode


def fresh_samples(episodes: Iterable[Episode]) -> dict[str, Sample]:
    """Samples that carry a loss, by a key that is unique over ranks and iterations."""
    return {
        _key(episode, turn): sample
        for episode in episodes
        for turn, sample in samples_of(episode, episode.advantages, episode.keep)
        if sample.mask.any()
    }


def admissible_entries(
    episodes: Iterable[Episode], samples: Mapping[str, Sample], has_tools: bool = True
) -> list[ReplayEntry]:
    """Replay entries of the samples with a positive advantage (algorithm.md §3), stored together.

    Args:
        episodes: of one iteration.
        samples: of these episodes, by the keys of :func:`fresh_samples`, with the log-probabilities to keep.
        has_tools: the task has tools: only episodes with at least one tool call are admitted.
    """
    store = SampleStore()
    entries = [
        ReplayEntry(
            key=key,
            payload=store.add(sample),
            reward=episode.worth(sorted({int(turn) for turn in sample.turns[sample.mask]})),
            advantage=sample.advantage,
            iteration=episode.iteration,
        )
        for episode in episodes
        for key in (_key(episode, turn) for turn in range(len(episode.turns)))
        if (sample := samples.get(key)) is not None and is_admissible(sample.advantage, episode.tool_calls, has_tools)
    ]
    store.complete()
    return entries


def _key(episode: Episode, turn: int) -> str:
    return f"{episode.iteration}/{episode.group}/{episode.index}/{turn}"


def remember(baseline: RewardBaseline, statistics: GroupStatistics) -> None:
    """Take an iteration's groups into the reward baseline."""
    chosen = statistics.kept if baseline.groups == "kept" else np.ones_like(statistics.kept)
    baseline.update(statistics.means[chosen], statistics.deviations[chosen])


def draw_and_admit(
    replay: ReplayBuffer,
    baseline: RewardBaseline,
    episodes: Sequence[Episode],
    samples: Mapping[str, Sample],
    iteration: int,
    *,
    seed: int,
    has_tools: bool,
) -> tuple[dict[str, Sample], dict[str, float]]:
    """Draw before the new successes enter, so that none is both fresh and replayed. Every rank must call it.

    Args:
        replay: drawn from, and admitted to.
        baseline: that entries are judged by.
        episodes: this rank's episodes of the iteration. The schedule counts those in the batch.
        samples: made of them, as they are trained on.
        iteration: its number.
        seed: of the run.
        has_tools: whether only episodes that used a tool are admitted.

    Returns:
        The replayed samples of this rank, with recalibrated advantages Ã and the log-probabilities of when they were
        played, and metrics over all ranks.
    """
    played = sum(episode.samples for episode in episodes if episode.in_batch)
    drawn = replay.draw(iteration, baseline, seed=seed, fresh=sum(gather(played)), gather=concatenate)
    replay.add(admissible_entries(episodes, samples, has_tools), iteration, gather=concatenate)
    replayed = {found.entry.key: found.entry.payload.with_advantage(found.advantage) for found in drawn}
    return replayed, _metrics(replay, baseline, drawn, iteration)


def _metrics(
    replay: ReplayBuffer, baseline: RewardBaseline, drawn: Sequence[ReplaySample], iteration: int
) -> dict[str, float]:
    ages = [iteration - found.entry.iteration for found in drawn]
    sizes = gather((len(replay), len(drawn), sum(ages), sum(found.advantage for found in drawn)))
    size, used, age, advantage = np.sum(np.asarray(sizes, dtype=np.float64), axis=0)
    values = {"replay/size": size, "replay/used": used, "replay/p50": baseline.level}
    return values | ({"replay/age": age / used, "advantage/recalibrated": advantage / used} if used else {})

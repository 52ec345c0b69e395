"""Self-imitation of an iteration: what is drawn from replay, what enters it, and the baseline it is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spear_lightning.algorithm.replay import Drawn, ReplayBuffer, RewardBaseline
from spear_lightning.data.admission import admissible_entries, recalibrated
from spear_lightning.data.scored import ScoredEpisode
from spear_lightning.data.scoring import GroupStatistics
from spear_lightning.distributed.collectives import concatenate, gather
from spear_lightning.rollout.episode import Row


def remember(baseline: RewardBaseline, statistics: GroupStatistics) -> None:
    """Take an iteration's groups into the reward baseline."""
    chosen = statistics.kept if baseline.groups == "kept" else np.ones_like(statistics.kept)
    baseline.update(statistics.means[chosen], statistics.deviations[chosen])


def draw_and_admit(
    replay: ReplayBuffer,
    baseline: RewardBaseline,
    scored: Sequence[ScoredEpisode],
    rows: Mapping[str, Row],
    iteration: int,
    *,
    seed: int,
    normalize_std: bool,
    has_tools: bool,
) -> tuple[dict[str, Row], dict[str, float]]:
    """Draw before the new successes enter, so that none is both fresh and replayed. Every rank must call it.

    Args:
        replay: drawn from, and admitted to.
        baseline: that entries are judged by.
        scored: this rank's episodes of the iteration. The schedule counts those in the batch.
        rows: made of them, as they are trained on.
        iteration: its number.
        seed: of the run.
        normalize_std: whether fresh advantages are divided by a standard deviation.
        has_tools: whether only episodes that used a tool are admitted.

    Returns:
        The replayed rows of this rank, with their recalibrated advantages, and metrics over all ranks.
    """
    samples = sum(item.episode.samples for item in scored if item.in_batch)
    drawn = replay.draw(
        iteration,
        baseline,
        seed=seed,
        fresh=sum(gather(samples)),
        normalize_std=normalize_std,
        gather=concatenate,
    )
    replay.add(admissible_entries(scored, rows, has_tools), iteration, gather=concatenate)
    return recalibrated(drawn), _metrics(replay, baseline, drawn, iteration)


def _metrics(
    replay: ReplayBuffer, baseline: RewardBaseline, drawn: Sequence[Drawn], iteration: int
) -> dict[str, float]:
    ages = [iteration - item.entry.iteration for item in drawn]
    sizes = gather((len(replay), len(drawn), sum(ages), sum(item.advantage for item in drawn)))
    size, used, age, advantage = np.sum(np.asarray(sizes, dtype=np.float64), axis=0)
    values = {"replay/size": size, "replay/used": used, "replay/p50": baseline.level}
    return values | ({"replay/age": age / used, "advantage/recalibrated": advantage / used} if used else {})

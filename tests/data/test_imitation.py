"""What an iteration draws from replay and admits, and the baseline that it is judged by."""

from __future__ import annotations

import numpy as np
import pytest

from spear_lightning.algorithm import (
    GRPO,
    BaselineRecalibration,
    GiGPO,
    Mix,
    QualityFilters,
    ReinforcePlusPlusBaseline,
    ReplayBuffer,
    RewardBaseline,
    RewardComposer,
)
from spear_lightning.data.admission import admissible_entries, draw_and_admit, fresh_samples, remember
from spear_lightning.data.scoring import GroupStatistics, estimate_advantages, score_episode
from tests.data.made import make_episode

FILTERS = QualityFilters(keep_share=1.0)


def scored(outcomes, estimator, *, iteration=0, penalty=0.1, **changes):
    composer = RewardComposer(success=10.0, invalid_penalty=penalty)
    episodes = [
        make_episode(group, index, success=won, iteration=iteration, **changes)
        for group, wins in enumerate(outcomes)
        for index, won in enumerate(wins)
    ]
    items = [score_episode(episode, composer, FILTERS, 0.0) for episode in episodes]
    return items, estimate_advantages(items, estimator, FILTERS)


def play(buffer, baseline, items, iteration):
    return draw_and_admit(buffer, baseline, items, fresh_samples(items), iteration, seed=1, has_tools=True)


def test_the_baseline_takes_all_groups_or_those_kept():
    statistics = GroupStatistics(np.array([1.0, 2.0, 9.0]), np.ones(3), np.array([True, False, True]))
    everything, kept = RewardBaseline(), RewardBaseline(groups="kept")
    for baseline in (everything, kept):
        remember(baseline, statistics)
    assert (everything.median, kept.median) == (2.0, 5.0)


def test_the_percentile_is_a_setting():
    baseline = RewardBaseline(percentile=75)
    baseline.update([0.0, 1.0, 2.0, 3.0, 4.0])
    assert (baseline.median, baseline.level) == (2.0, 3.0)


@pytest.mark.parametrize(("context", "drawn"), [("conversation", 2), ("stepwise", 4)])
def test_mix_counts_samples_as_the_buffer_does(context, drawn):
    """Half as many as are fresh: of four episodes two, of their eight turns four."""
    buffer, baseline = ReplayBuffer(schedule=Mix(0.5)), RewardBaseline()
    estimator = GRPO(normalize_std=False)
    first, _ = scored([[True, False]] * 8, estimator, context=context)
    assert play(buffer, baseline, first, 0)[0] == {}
    second, _ = scored([[True, False]] * 2, estimator, iteration=1, context=context)
    rows, metrics = play(buffer, baseline, second, 1)
    assert len(rows) == metrics["replay/used"] == drawn
    assert metrics["replay/age"] == 1.0


def test_an_entry_is_worth_r_less_the_penalties_of_its_turns():
    items, _ = scored([[True, False]], GRPO(normalize_std=False), context="stepwise")
    items[0].penalties[1] = 0.1
    entries = admissible_entries(items, fresh_samples(items))
    assert [entry.reward for entry in entries] == [10.0, pytest.approx(9.9)]
    items, _ = scored([[True, False]], GRPO(normalize_std=False))
    items[0].penalties[1] = 0.1
    assert [entry.reward for entry in admissible_entries(items, fresh_samples(items))] == [pytest.approx(9.95)]


@pytest.mark.parametrize(
    "estimator", [GRPO(), ReinforcePlusPlusBaseline(), GiGPO(mode="mean_std_norm", step_weight=0.0)]
)
def test_replayed_and_fresh_advantages_are_on_one_scale(estimator):
    """In groups alike, half of which succeeds, a replayed success weighs what a fresh one does."""
    items, statistics = scored([[True, False]] * 6, estimator)
    buffer, baseline = ReplayBuffer(schedule=Mix(1.0)), RewardBaseline()
    remember(baseline, statistics)
    play(buffer, baseline, items, 0)
    again, _ = scored([[True, False]] * 6, estimator, iteration=1)
    _, metrics = play(buffer, baseline, again, 1)
    assert metrics["advantage/recalibrated"] == pytest.approx(items[0].advantages[0], rel=1e-5)
    undivided = ReplayBuffer(schedule=Mix(1.0), recalibration=BaselineRecalibration(normalize_std=False))
    play(undivided, baseline, items, 0)
    _, metrics = play(undivided, baseline, again, 1)
    assert metrics["advantage/recalibrated"] == pytest.approx(5.0)

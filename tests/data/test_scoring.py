from __future__ import annotations

import numpy as np
import pytest

from spear_lightning.algorithm import GRPO, RLOO, GiGPO, QualityFilters, ReinforcePlusPlusBaseline, RewardComposer
from spear_lightning.data.admission import admissible_entries, fresh_samples
from spear_lightning.data.scoring import estimate_advantages, groups_with_signal, score_episode, shares_filtered
from tests.data.made import make_episode, make_turn

FILTERS = QualityFilters(keep_share=1.0)


def scored_group(outcomes, filters=FILTERS, **changes):
    composer = RewardComposer(success=10.0, invalid_penalty=0.1)
    episodes = [
        make_episode(group, index, success=won, **changes)
        for group, wins in enumerate(outcomes)
        for index, won in enumerate(wins)
    ]
    return [score_episode(episode, composer, filters, 0.0) for episode in episodes]


def test_advantages_are_relative_to_the_group():
    scored = scored_group([[True, False, False, False], [True, True, False, False]])
    statistics = estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    assert [item.advantages.tolist() for item in scored[:2]] == [[7.5, 7.5], [-2.5, -2.5]]
    assert [item.advantages[0] for item in scored[4:]] == [5, 5, -5, -5]
    np.testing.assert_allclose(statistics.means, [2.5, 5.0])
    assert statistics.kept.tolist() == [True, True]


def test_a_group_without_deviation_is_dropped_and_carries_no_loss():
    scored = scored_group([[True, False], [False, False], [True, True]])
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    assert [item.group_kept for item in scored] == [True, True, False, False, False, False]
    assert [bool(item.keep.any()) for item in scored] == [True, True, False, False, False, False]
    assert set(fresh_samples(scored)) == {"0/0/0/0", "0/0/1/0"}


def test_a_filtered_episode_counts_in_the_baseline_and_not_in_the_loss():
    scored = scored_group([[True, False]])
    cut = make_episode(0, 2, turns=1)
    cut.turns = [make_turn(finish="length")]
    scored.append(score_episode(cut, RewardComposer(success=10.0), FILTERS, 0.0))
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    assert scored[2].filters == {"overlong"}
    assert not scored[2].keep.any()
    assert scored[0].advantages[0] == pytest.approx(10 - 10 / 3)


def test_in_stepwise_context_a_filter_takes_out_only_its_turns():
    episode = make_episode(context="stepwise", turns=2)
    episode.turns.append(make_turn(action=None, tool_call=False, valid=False))
    scored = score_episode(episode, RewardComposer(), FILTERS, 0.0)
    assert scored.keep.tolist() == [True, True, False]
    assert scored.filters == {"incomplete"}


def test_a_penalty_is_paid_by_the_turn_in_which_it_was_incurred():
    for context in ("stepwise", "conversation"):
        scored = scored_group([[True, False, False]], context=context)
        scored[1].penalties[0] = 0.1
        estimate_advantages(scored, GRPO(normalize_std=False, weighting="episode"), FILTERS)
        np.testing.assert_allclose(scored[0].advantages, [20 / 3, 20 / 3])
        np.testing.assert_allclose(scored[1].advantages, [-0.1 - 10 / 3, -10 / 3])
        rows = fresh_samples(scored[1:2])
        of_turn = {turn: row.advantages[row.turns == turn] for row in rows.values() for turn in set(row.turns) - {-1}}
        assert {turn: round(float(values.mean()), 4) for turn, values in of_turn.items()} == {0: -3.4333, 1: -3.3333}


def test_in_conversation_context_long_episodes_weigh_no_more_than_short_ones():
    scored = scored_group([[True, False]])
    long = make_episode(0, 2, turns=9)
    scored.append(score_episode(long, RewardComposer(), FILTERS, 0.0))
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    assert scored[0].advantages[0] == pytest.approx(10 - 10 / 3)
    for item in scored:
        item.context = "stepwise"
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    assert scored[0].advantages[0] == pytest.approx(10 - 20 / 13)


def test_a_group_in_which_only_penalties_differ_is_kept_and_pays_them():
    scored = scored_group([[False] * 8])
    assert estimate_advantages(scored, GRPO(), FILTERS).kept.tolist() == [False]
    scored = scored_group([[False] * 8])
    scored[0].penalties[0] = 0.1
    assert estimate_advantages(scored, GRPO(), FILTERS).kept.tolist() == [True]
    assert scored[0].group_std == 0.0
    np.testing.assert_allclose(scored[0].advantages, [-0.1, 0.0])


SIGNAL = [[True, False, False, False], [True, True, False, False]]
FLAT = [[False] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize("context", ["stepwise", "conversation"])
@pytest.mark.parametrize("estimator", [GRPO(), RLOO(), ReinforcePlusPlusBaseline(), GiGPO(mode="mean_std_norm")])
def test_groups_that_were_replaced_change_nothing_for_the_others(estimator, context):
    alone, beside = (scored_group(groups, context=context) for groups in (SIGNAL, SIGNAL + FLAT))
    beside[8].penalties[0] = 0.1  # R is still the same for all of its group
    expected = estimate_advantages(alone, estimator, FILTERS)
    found = estimate_advantages(beside, estimator, FILTERS, batch=2)
    for mine, other in zip(beside[:8], alone, strict=True):
        np.testing.assert_array_equal(mine.advantages, other.advantages)
    np.testing.assert_array_equal(found.deviations[:2], expected.deviations)
    np.testing.assert_array_equal(found.means, [2.5, 5.0, 0.0, 10.0, 0.0])
    assert found.kept.tolist() == [True, True, False, False, False]
    for item in beside[8:]:
        assert not item.group_kept
        assert not item.in_batch
        assert not item.keep.any()
    assert groups_with_signal(beside) == {0, 1}


def test_the_share_of_groups_is_taken_among_those_with_signal():
    filters = QualityFilters(keep_share=0.75)
    scored = scored_group([*FLAT, *SIGNAL, *SIGNAL], filters)
    assert np.flatnonzero(estimate_advantages(scored, GRPO(), filters, batch=4).kept).tolist() == [3, 4, 6]
    scored = scored_group([*FLAT, *SIGNAL], filters)
    kept = estimate_advantages(scored, GRPO(), filters, batch=4).kept
    assert np.flatnonzero(kept).tolist() == [3, 4], "of four groups three may stay, and only two have a signal"
    scored = scored_group(FLAT)
    assert not estimate_advantages(scored, ReinforcePlusPlusBaseline(), FILTERS, batch=2).kept.any()


def test_gigpo_sees_step_rewards_and_anchors():
    scored = scored_group([[True, False]], context="stepwise")
    estimate_advantages(scored, GiGPO(gamma=0.5), FILTERS)
    # All turns share one anchor: returns 5, 10 (won) and 0, 0 (lost); mean 3.75.
    np.testing.assert_allclose(scored[0].advantages, [5 + 1.25, 5 + 6.25])
    np.testing.assert_allclose(scored[1].advantages, [-5 - 3.75, -5 - 3.75])


def test_an_episode_without_turns_is_scored_and_trained_on_nowhere():
    scored = [
        *scored_group([[True, False]]),
        score_episode(make_episode(0, 2, turns=0), RewardComposer(), FILTERS, 0.0),
    ]
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    assert len(scored[2].advantages) == 0
    assert set(fresh_samples(scored)) == {"0/0/0/0", "0/0/1/0"}


def test_only_better_than_average_episodes_that_acted_are_admitted():
    scored = scored_group([[True, False]])
    idle = make_episode(0, 2, success=True)
    idle.turns = [make_turn(tool_call=False)]
    scored.append(score_episode(idle, RewardComposer(success=10.0), FILTERS, 0.0))
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    rows = fresh_samples(scored)
    entries = admissible_entries(scored, rows)
    assert [entry.key for entry in entries] == ["0/0/0/0"]
    assert entries[0].reward == 10.0
    assert entries[0].advantage == pytest.approx(10 / 3)
    without_tools = admissible_entries(scored, rows, has_tools=False)
    assert [entry.key for entry in without_tools] == ["0/0/0/0", "0/0/2/0"], "where there is no tool, none is missed"


def test_replayed_rows_keep_the_log_probabilities_they_were_played_with():
    scored = scored_group([[True, False]])
    estimate_advantages(scored, GRPO(normalize_std=False), FILTERS)
    rows = fresh_samples(scored)
    entry = admissible_entries(scored, rows)[0]
    row = entry.payload.with_advantage(2.5)
    np.testing.assert_array_equal(row.logps, rows[entry.key].logps)
    np.testing.assert_array_equal(row.advantages[row.turns >= 0], np.float32(2.5))
    assert (row.advantages[row.turns < 0] == 0).all()


def test_the_share_of_episodes_that_a_filter_takes_out_is_told():
    scored = scored_group([[True, False, False]])
    assert shares_filtered(scored) == {}
    void = make_episode(0, 3, turns=1)
    void.turns = [make_turn(action=None, tool_call=False, valid=False)]
    scored.append(score_episode(void, RewardComposer(), FILTERS, 0.0))
    assert shares_filtered(scored) == {"incomplete": 0.25}
    assert shares_filtered([]) == {}

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_lightning.algorithm import RewardComposer, tool_reward


@pytest.mark.parametrize(
    ("calls", "correct", "variant", "expected"),
    [
        (0, True, "linear", 0.0),
        (3, False, "linear", 0.3),
        (3, True, "linear", 0.3),
        (25, False, "linear", 1.0),
        (0, True, "flat_when_correct", 0.0),
        (1, True, "flat_when_correct", 1.0),
        (3, False, "flat_when_correct", 0.3),
    ],
)
def test_tool_reward_by_hand(calls, correct, variant, expected):
    assert tool_reward(calls, correct=correct, variant=variant) == pytest.approx(expected)


def test_an_episode_by_hand():
    parts = RewardComposer(tool_scale=0.2, format_reward=0.5).compose(True, 1.0, 4, [False, True, False], mu=0.5)
    assert (parts.outcome, parts.tool, parts.format) == (10.0, pytest.approx(0.04), 0.0)
    assert parts.total == pytest.approx(10.04)
    np.testing.assert_allclose(parts.penalties, [0.0, 0.1, 0.0])  # paid by the turn in which it was incurred
    np.testing.assert_allclose(parts.step_rewards, [0.0, 0.0, 10.0])  # the environment's own, without the tool reward


def test_a_well_formed_failure_and_partial_credit():
    composer = RewardComposer(success=1.0, failure=-1.0, format_reward=0.5, score_scale=2.0)
    parts = composer.compose(False, 0.25, 0, [False], mu=1.0)
    assert (parts.outcome, parts.tool, parts.format, parts.total) == (-0.5, 0.0, 0.5, 0.0)
    np.testing.assert_allclose(parts.step_rewards, [-0.5])


def test_an_episode_without_turns_still_has_an_outcome():
    parts = RewardComposer(failure=-1.0, format_reward=0.5).compose(False, 0.0, 0, [], mu=1.0)
    assert parts.total == -1.0
    assert parts.step_rewards.shape == parts.penalties.shape == (0,)


@given(st.booleans(), st.integers(0, 30), st.lists(st.booleans(), min_size=1, max_size=50), st.floats(0, 1))
def test_parts_sum_to_the_total_and_penalties_are_no_part_of_it(success, calls, invalid, mu):
    composer = RewardComposer(format_reward=0.3)
    parts = composer.compose(success, 0.0, calls, invalid, mu)
    assert parts.outcome + parts.tool + parts.format == parts.total
    assert parts.step_rewards.sum() == parts.outcome
    assert parts.penalties.sum() == pytest.approx(composer.invalid_penalty * sum(invalid))
    assert composer.compose(success, 0.0, calls, sorted(invalid), mu).total == parts.total


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"invalid_penalty": -0.1}, "invalid_penalty"),
        ({"tool_scale": -1.0}, "tool_scale"),
        ({"score_scale": -1.0}, "score_scale"),
        ({"success": 0.0}, "success"),
        ({"tool_variant": "square"}, "square"),
    ],
)
def test_bad_options_are_named(options, key):
    with pytest.raises(ValueError, match=key):
        RewardComposer(**options)

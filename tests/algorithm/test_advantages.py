import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm.advantages import (
    discounted_returns,
    gigpo,
    group_moments,
    grpo,
    reinforce_plus_plus_baseline,
    rloo,
)
from spear_lightning.algorithm.estimators import GRPO, RLOO, GiGPO, ReinforcePlusPlusBaseline, TurnTable


def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual), torch.tensor(expected, dtype=torch.float64), **tolerance)


def test_grpo_by_hand():
    rewards, groups = [0.0, 10.0, 5.0, 7.0], ["a", "b", "a", "c"]
    std = 12.5**0.5  # of 0 and 5, n − 1
    close(grpo(rewards, groups), [-2.5 / (std + 1e-6), 10.0, 2.5 / (std + 1e-6), 7.0])
    close(grpo(rewards, groups, normalize_std=False), [-2.5, 10.0, 2.5, 7.0])


def test_group_moments_are_exact_where_nothing_varies():
    moments = group_moments([0.1, 0.1, 0.1, 3.0], [0, 0, 0, 1])  # the mean of three 0.1 is not 0.1 in floats
    assert moments.std.tolist() == [0.0] * 4
    assert moments.mean.tolist() == [0.1, 0.1, 0.1, 3.0]
    assert moments.size.tolist() == [3, 3, 3, 1]
    assert grpo([0.1, 0.1, 0.1], [0, 0, 0]).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-10, 10)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_group_moments_against_numpy(rows):
    groups, values = [row[0] for row in rows], [row[1] for row in rows]
    moments = group_moments(values, groups)
    for row, group in enumerate(groups):
        mine = [value for value, other in zip(values, groups, strict=True) if other == group]
        assert moments.mean[row].item() == pytest.approx(np.mean(mine), abs=1e-12)
        assert moments.std[row].item() == pytest.approx(np.std(mine, ddof=1) if len(mine) > 1 else 0.0, abs=1e-9)


def test_rloo_by_hand():
    close(rloo([1.0, 2.0, 6.0, 5.0], [0, 0, 0, 1]), [1 - 4.0, 2 - 3.5, 6 - 1.5, 5.0])


def test_reinforce_plus_plus_baseline_by_hand():
    centred = np.array([-1.0, 1.0, -3.0, 3.0])
    close(
        reinforce_plus_plus_baseline([0.0, 2.0, 1.0, 7.0], [0, 0, 1, 1]),
        (centred / (np.std(centred, ddof=1) + 1e-6)).tolist(),
    )
    assert reinforce_plus_plus_baseline([2.0, 2.0], [0, 0]).tolist() == [0.0, 0.0]
    assert reinforce_plus_plus_baseline([2.0], [0]).tolist() == [2.0]


def test_discounted_returns_by_hand():
    # Two episodes, their turns interleaved.
    close(discounted_returns([1.0, 10.0, 0.0, 20.0, 4.0], [7, 9, 7, 9, 7], 0.5), [2.0, 20.0, 2.0, 20.0, 4.0])


def test_kinds_of_input_agree_and_precision_is_kept():
    rewards, groups = [0.0, 1.0, 3.0, 3.0], [5, 5, 2, 5]
    expected = grpo(rewards, groups)
    assert expected.dtype == torch.float64
    assert torch.equal(grpo(np.array(rewards), np.array(groups)), expected)
    assert torch.equal(grpo(torch.tensor([0, 1, 3, 3]), torch.tensor(groups)), expected)
    assert grpo(torch.tensor(rewards), groups).dtype == torch.float32


def test_empty_input():
    assert grpo([], []).shape == rloo([], []).shape == discounted_returns([], [], 0.9).shape == (0,)
    assert gigpo([], [], [], [], [], episode_weighting="episode").shape == (0,)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 values but 2 ids"):
        grpo([1.0, 2.0, 3.0], [0, 0])
    with pytest.raises(ValueError, match="2 episode_returns but 1 anchors"):
        gigpo([1.0, 2.0], [1.0, 2.0], [0, 0], [0, 1], ["x"])


def test_std_normalisation_blows_a_penalty_up_where_all_fail():
    """Nothing but a penalty of 0.1 differs, and the advantages are as large as between success and failure."""
    failing = grpo([0.0, -0.1, 0.0, -0.1, -0.1, 0.0, 0.0, -0.1], [0] * 8)
    winning = grpo([10.0, 0.0, 10.0, 0.0, 0.0, 10.0, 10.0, 0.0], [0] * 8)
    assert failing.abs().min() > 0.9
    torch.testing.assert_close(failing, winning, rtol=1e-4, atol=0)
    # The remedy: without the division a penalty weighs what it costs, next to a success of 10.
    assert grpo([0.0, -0.1, 0.0, -0.1, -0.1, 0.0, 0.0, -0.1], [0] * 8, normalize_std=False).abs().max() < 0.06


def slow_gigpo(totals, steps, groups, episodes, anchors, mode, weight, weighting, singleton, eps=1e-6):
    """GiGPO told row by row."""

    def relative(value, peers, alone):
        if len(peers) == 1:
            return alone
        if max(peers) == min(peers):
            return 0.0
        difference = value - sum(peers) / len(peers)
        return difference if mode == "mean_norm" else difference / (np.std(peers, ddof=1) + eps)

    rows, out = range(len(totals)), []
    for i in rows:
        mates = [j for j in rows if groups[j] == groups[i]]
        if weighting == "episode":
            mates = [j for j in mates if j == min(k for k in mates if episodes[k] == episodes[j])]
        alike = [j for j in rows if groups[j] == groups[i] and anchors[j] == anchors[i]]
        alone = steps[i] if singleton == "raw" else 0.0
        out.append(
            relative(totals[i], [totals[j] for j in mates], totals[i])
            + weight * relative(steps[i], [steps[j] for j in alike], alone)
        )
    return out


@st.composite
def turn_tables(draw):
    """Episodes in groups; equal totals within an episode; few anchors, so that they meet."""
    episodes = draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=6)
    )
    totals, groups, numbers = [], [], []
    for number, (group, total, turns) in enumerate(episodes):
        totals += [float(total)] * turns
        groups += [group] * turns
        numbers += [number] * turns
    steps = draw(st.lists(st.floats(-3, 3), min_size=len(totals), max_size=len(totals)))
    anchors = draw(st.lists(st.sampled_from("abc"), min_size=len(totals), max_size=len(totals)))
    return totals, steps, groups, numbers, anchors


@given(
    turn_tables(),
    st.sampled_from(["mean_norm", "mean_std_norm"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from(["turn", "episode"]),
    st.sampled_from(["raw", "zero"]),
)
@settings(max_examples=200, deadline=None)
def test_gigpo_against_a_slow_one(table, mode, weight, weighting, singleton):
    fast = gigpo(*table, mode=mode, step_weight=weight, episode_weighting=weighting, singleton=singleton)
    slow = slow_gigpo(*table, mode, weight, weighting, singleton)
    close(fast, slow, rtol=1e-5, atol=1e-7)


def test_gigpo_by_hand():
    # One group: episode 0 wins in two turns, episode 1 fails in one. Both start from "kitchen".
    arguments = ([10.0, 10.0, 0.0], [9.5, 10.0, 0.0], [0, 0, 0], [0, 0, 1], ["kitchen", "desk", "kitchen"])
    by_turn, by_episode = 20 / 3, 5.0
    step = [9.5 - 4.75, 10.0, 0.0 - 4.75]
    close(gigpo(*arguments), [10 - by_turn + step[0], 10 - by_turn + step[1], -by_turn + step[2]])
    close(gigpo(*arguments, episode_weighting="episode"), [5 + step[0], 5 + step[1], -by_episode + step[2]])
    close(gigpo(*arguments, episode_weighting="episode", singleton="zero"), [5 + step[0], 5.0, -5 + step[2]])
    for option in ("mode", "episode_weighting", "singleton"):
        with pytest.raises(ValueError, match=f"gigpo: unknown {option} 'other'"):
            gigpo(*arguments, **{option: "other"})


TABLE = TurnTable(
    episode_rewards=np.array([10.0, 10.0, 0.0, 4.0, 4.0]),
    step_rewards=np.array([0.0, 10.0, 0.0, 1.0, 3.0]),
    groups=np.array([0, 0, 0, 0, 0]),
    episodes=np.array([4, 4, 2, 9, 9]),
    anchors=["a", "b", "a", "a", "c"],
)


def test_episode_estimators_count_each_episode_once():
    dr = GRPO(normalize_std=False)(TABLE)
    mean = 14 / 3
    np.testing.assert_allclose(dr, [10 - mean, 10 - mean, -mean, 4 - mean, 4 - mean])
    std = np.std([10, 0, 4], ddof=1)
    np.testing.assert_allclose(GRPO()(TABLE), dr / (std + 1e-6))
    np.testing.assert_allclose(RLOO()(TABLE), [8, 8, -7, -1, -1])
    np.testing.assert_allclose(ReinforcePlusPlusBaseline()(TABLE), dr / (std + 1e-6))


def test_gigpo_estimator_discounts_the_rewards_of_turns():
    expected = gigpo(
        TABLE.episode_rewards, [5.0, 10.0, 0.0, 2.5, 3.0], TABLE.groups, TABLE.episodes, TABLE.anchors, step_weight=2.0
    )
    np.testing.assert_allclose(GiGPO(gamma=0.5, step_weight=2.0)(TABLE), expected)


def test_estimators_say_whether_they_normalise():
    normalising = [GRPO(), GiGPO(mode="mean_std_norm"), ReinforcePlusPlusBaseline()]
    others = [GRPO(normalize_std=False), GiGPO(), RLOO()]
    assert [e.normalizes_std for e in normalising + others] == [True] * 3 + [False] * 3


def test_bad_tables_and_options_are_named():
    with pytest.raises(ValueError, match=r"one row per turn.*'anchors': 1"):
        TurnTable(np.zeros(2), np.zeros(2), np.zeros(2, int), np.zeros(2, int), ["a"])
    with pytest.raises(ValueError, match=r"GiGPO\.gamma"):
        GiGPO(gamma=1.5)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm import (
    GRPO,
    RLOO,
    GiGPO,
    ReinforcePlusPlusBaseline,
    TurnTable,
    discounted_returns,
    gigpo,
    group_moments,
    grpo,
    grpo_turns,
)


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


def single_turns(rewards, groups):
    """Episodes of one turn, without penalties."""
    zeros, numbers = np.zeros(len(rewards)), np.arange(len(rewards))
    return TurnTable(np.array(rewards), zeros, zeros, np.array(groups), numbers, [""] * len(rewards))


def test_rloo_by_hand():
    close(RLOO()(single_turns([1.0, 2.0, 6.0, 5.0], [0, 0, 0, 1])), [1 - 4.0, 2 - 3.5, 6 - 1.5, 5.0])


def test_reinforce_plus_plus_baseline_by_hand():
    centred = np.array([-1.0, 1.0, -3.0, 3.0])
    estimator = ReinforcePlusPlusBaseline()
    close(
        estimator(single_turns([0.0, 2.0, 1.0, 7.0], [0, 0, 1, 1])),
        (centred / (np.std(centred, ddof=1) + 1e-6)).tolist(),
    )
    assert estimator(single_turns([2.0, 2.0], [0, 0])).tolist() == [0.0, 0.0]
    assert estimator(single_turns([2.0], [0])).tolist() == [2.0]


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
    assert grpo([], []).shape == discounted_returns([], [], 0.9).shape == (0,)
    assert gigpo([], [], [], [], [], episode_weighting="episode").shape == (0,)
    assert RLOO()(single_turns([], [])).shape == (0,)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 values but 2 ids"):
        grpo([1.0, 2.0, 3.0], [0, 0])
    with pytest.raises(ValueError, match="2 episode_returns but 1 anchors"):
        gigpo([1.0, 2.0], [1.0, 2.0], [0, 0], [0, 1], ["x"])
    with pytest.raises(ValueError, match="2 step_rewards but 1 episodes"):
        discounted_returns([1.0, 2.0], [0], 0.5)


def failing_group():
    """Eight episodes of 50 turns that all fail, with 0, 5 … 35 invalid turns: returns, penalties, episodes."""
    penalties = [0.1 if turn < 5 * episode else 0.0 for episode in range(8) for turn in range(50)]
    return [0.0] * 400, penalties, [episode for episode in range(8) for _ in range(50)]


def test_a_penalty_is_paid_by_its_own_turn_where_all_fail():
    """A valid turn of the worst episode is better than the average turn; charged to the episode it would get −1.43."""
    returns, penalties, episodes = failing_group()
    advantages = grpo_turns(returns, penalties, [0] * 400, episodes)
    std = np.std(penalties, ddof=1)
    assert advantages[-1].item() == pytest.approx(0.035 / (std + 1e-6)) == pytest.approx(0.73, abs=0.01)
    assert advantages[-50].item() == pytest.approx(-0.065 / (std + 1e-6)) == pytest.approx(-1.36, abs=0.01)
    charged_to_the_episode = grpo([-0.5 * number for number in range(8)], [0] * 8)
    assert charged_to_the_episode[-1].item() == pytest.approx(-1.43, abs=0.01)
    # Without the division a penalty weighs what it costs, next to a success of 10; where no R differs, so it does when
    # moments are over episodes.
    for options in ({"normalize_std": False}, {"weighting": "episode"}):
        assert grpo_turns(returns, penalties, [0] * 400, episodes, **options).abs().max() <= 0.1


def test_grpo_over_turns_by_hand():
    # A win of two turns, one of them invalid, a failure of one turn.
    arguments = ([10.0, 10.0, 0.0], [0.0, 0.5, 0.0], [0, 0, 0], [0, 0, 1])
    worth = np.array([10.0, 9.5, 0.0])
    close(grpo_turns(*arguments), ((worth - worth.mean()) / (worth.std(ddof=1) + 1e-6)).tolist())
    close(grpo_turns(*arguments, normalize_std=False), (worth - 6.5).tolist())
    std = 50**0.5  # of 10 and 0
    close(grpo_turns(*arguments, weighting="episode"), ((worth - 5) / (std + 1e-6)).tolist())
    close(grpo_turns(*arguments, weighting="episode", normalize_std=False), (worth - 5).tolist())
    close(grpo_turns([3.0], [0.5], [0], [0]), [2.5])
    with pytest.raises(ValueError, match="grpo_turns: unknown weighting 'token'"):
        grpo_turns(*arguments, weighting="token")
    with pytest.raises(ValueError, match="penalties must not be negative"):
        grpo_turns([1.0], [-0.1], [0], [0])
    with pytest.raises(ValueError, match="2 returns but 1 penalties"):
        grpo_turns([1.0, 2.0], [0.0], [0, 0], [0, 1])


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-10, 10)), max_size=20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_with_one_turn_an_episode_grpo_over_turns_is_grpo(rows, normalize):
    groups, rewards = [row[0] for row in rows], [row[1] for row in rows]
    for weighting in ("turn", "episode"):
        over_turns = grpo_turns(
            rewards, [0.0] * len(rows), groups, range(len(rows)), normalize_std=normalize, weighting=weighting
        )
        torch.testing.assert_close(over_turns, grpo(rewards, groups, normalize_std=normalize))


def slow_gigpo(totals, steps, groups, episodes, anchors, mode, weight, weighting, eps=1e-6):
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
        out.append(
            relative(totals[i], [totals[j] for j in mates], totals[i])
            + weight * relative(steps[i], [steps[j] for j in alike], 0.0)
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
)
@settings(max_examples=200, deadline=None)
def test_gigpo_against_a_slow_one(table, mode, weight, weighting):
    fast = gigpo(*table, mode=mode, step_weight=weight, episode_weighting=weighting)
    slow = slow_gigpo(*table, mode, weight, weighting)
    close(fast, slow, rtol=1e-5, atol=1e-7)


def test_gigpo_by_hand():
    # One group: episode 0 wins in two turns, episode 1 fails in one. Both start from "kitchen"; "desk" is seen once.
    arguments = ([10.0, 10.0, 0.0], [9.5, 10.0, 0.0], [0, 0, 0], [0, 0, 1], ["kitchen", "desk", "kitchen"])
    by_turn, by_episode = 20 / 3, 5.0
    step = [9.5 - 4.75, 0.0, 0.0 - 4.75]
    close(gigpo(*arguments), [10 - by_turn + step[0], 10 - by_turn + step[1], -by_turn + step[2]])
    close(gigpo(*arguments, episode_weighting="episode"), [5 + step[0], 5 + step[1], -by_episode + step[2]])
    # A penalty is paid at both levels by its own turn.
    paid = gigpo(*arguments, episode_weighting="episode", penalties=[0.0, 0.0, 0.1])
    close(paid, [5 + 9.5 - 4.7, 5.0, -5 - 0.1 - 0.1 - 4.7])
    for option in ("mode", "episode_weighting"):
        with pytest.raises(ValueError, match=f"gigpo: unknown {option} 'other'"):
            gigpo(*arguments, **{option: "other"})


def test_gigpo_pays_nothing_for_lone_states():
    """Eight episodes of ten turns, four wins, only the first state is shared: as the reference pays them."""
    wins = [episode < 4 for episode in range(8) for _ in range(10)]
    rewards = [10.0 if win and turn % 10 == 9 else 0.0 for turn, win in enumerate(wins)]
    episodes = [turn // 10 for turn in range(80)]
    anchors = ["start" if turn % 10 == 0 else f"lone {turn}" for turn in range(80)]
    totals = [10.0 if win else 0.0 for win in wins]
    advantages = gigpo(totals, discounted_returns(rewards, episodes, 0.95), [0] * 80, episodes, anchors)
    assert advantages[:10].tolist() == pytest.approx([5 + 10 * 0.95**9 / 2] + [5.0] * 9)
    assert advantages[0].item() == pytest.approx(8.15, abs=0.005)
    assert advantages.sum().item() == pytest.approx(0.0, abs=1e-9)


def table(**changes):
    columns = {
        "returns": np.array([10.0, 10.0, 0.0, 4.0, 4.0]),
        "penalties": np.array([0.0, 0.5, 0.0, 0.0, 0.5]),
        "step_rewards": np.array([0.0, 10.0, 0.0, 1.0, 3.0]),
        "groups": np.array([0, 0, 0, 0, 0]),
        "episodes": np.array([4, 4, 2, 9, 9]),
        "anchors": ["a", "b", "a", "a", "c"],
    }
    return TurnTable(**{**columns, **changes})


def test_estimators_over_turns_and_over_episodes():
    worth = np.array([10.0, 9.5, 0.0, 4.0, 3.5])
    np.testing.assert_allclose(GRPO(normalize_std=False)(table()), worth - worth.mean())
    by_episode = worth - 14 / 3
    np.testing.assert_allclose(GRPO(normalize_std=False, weighting="episode")(table()), by_episode)
    # With one sample an episode there is nothing to weigh: long episodes count once, whatever is asked for.
    np.testing.assert_allclose(GRPO(normalize_std=False)(table(samples="episode")), by_episode)
    std = np.std([10, 0, 4], ddof=1)
    np.testing.assert_allclose(GRPO(weighting="episode")(table()), by_episode / (std + 1e-6))
    penalties = table().penalties
    np.testing.assert_allclose(RLOO()(table()), [8, 8, -7, -1, -1] - penalties)
    np.testing.assert_allclose(
        ReinforcePlusPlusBaseline()(table()), np.array([10, 10, 0, 4, 4] - penalties - 14 / 3) / std, rtol=1e-6
    )


def test_gigpo_estimator_discounts_the_environments_rewards_and_no_penalty():
    it = table()
    expected = gigpo(
        it.returns,
        [5.0, 10.0, 0.0, 2.5, 3.0],
        it.groups,
        it.episodes,
        it.anchors,
        step_weight=2.0,
        penalties=it.penalties,
    )
    np.testing.assert_allclose(GiGPO(gamma=0.5, step_weight=2.0)(it), expected)
    by_episode = gigpo(
        it.returns,
        [5.0, 10.0, 0.0, 2.5, 3.0],
        it.groups,
        it.episodes,
        it.anchors,
        episode_weighting="episode",
        penalties=it.penalties,
    )
    np.testing.assert_allclose(GiGPO(gamma=0.5)(table(samples="episode")), by_episode)


def test_estimators_tell_what_they_divide_by():
    two = {"groups": np.array([7, 7, 7, 3, 3]), "episodes": np.array([0, 0, 1, 2, 3])}
    two["returns"] = np.array([10.0, 10.0, 0.0, 4.0, 6.0])
    over_turns = [np.std([4.0, 5.5], ddof=1), np.std([10.0, 9.5, 0.0], ddof=1)]  # groups 3 and 7
    over_episodes = [np.std([4.0, 6.0], ddof=1), np.std([10.0, 0.0], ddof=1)]
    np.testing.assert_allclose(GRPO().deviations(table(**two)), over_turns)
    np.testing.assert_allclose(GiGPO(mode="mean_std_norm").deviations(table(**two)), over_turns)
    np.testing.assert_allclose(GRPO(weighting="episode").deviations(table(**two)), over_episodes)
    batch = np.std([5, -5, -1, 1], ddof=1)  # REINFORCE++ divides all groups by the deviation of the batch
    np.testing.assert_allclose(ReinforcePlusPlusBaseline().deviations(table(**two)), [batch, batch])
    for estimator in (GRPO(normalize_std=False), GiGPO(), RLOO()):
        assert estimator.deviations(table(**two)).tolist() == [1.0, 1.0]


def test_a_penalty_is_not_divided_by_a_batch_without_deviation():
    flat = table(returns=np.zeros(5))
    np.testing.assert_allclose(ReinforcePlusPlusBaseline()(flat), -flat.penalties)


def test_estimators_say_whether_they_normalise():
    normalising = [GRPO(), GiGPO(mode="mean_std_norm"), ReinforcePlusPlusBaseline()]
    others = [GRPO(normalize_std=False), GiGPO(), RLOO()]
    assert [e.normalizes_std for e in normalising + others] == [True] * 3 + [False] * 3


def test_bad_tables_and_options_are_named():
    with pytest.raises(ValueError, match=r"one row per turn.*'anchors': 1"):
        table(anchors=["a"])
    with pytest.raises(ValueError, match=r"GiGPO\.gamma must be at least 0 and at most 1, not 1\.5"):
        GiGPO(gamma=1.5)

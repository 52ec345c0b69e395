from __future__ import annotations

import warnings

import pytest

from spear_lightning.algorithm import Mix, QualityFilters, ReplayBuffer, RewardBaseline, RewardComposer
from spear_lightning.data.admission import draw_and_admit
from spear_lightning.data.resampling import Resampling, play_until_signal
from spear_lightning.data.scoring import score_episode
from spear_lightning.rollout.episode import Rollout
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.watch import Watch
from tests.data.made import make_episode

FILTERS = QualityFilters(overlong=False, incomplete=False, repetitive=False, unreadable=False, keep_share=1.0)


def scored(group: int, index: int, success: bool):
    return score_episode(make_episode(group, index, success=success), RewardComposer(), FILTERS, 0.0)


class Play:
    """Two episodes a group, one of which is won in the groups that carry signal; remembers what it was asked for."""

    def __init__(self, *signal: int) -> None:
        self.signal, self.asked = signal, []

    def __call__(self, groups: range) -> Rollout:
        self.asked.append(list(groups))
        episodes = [scored(group, index, index == 0 and group in self.signal) for group in groups for index in range(2)]
        aborted = [make_episode(groups.start, 2, status="aborted")]
        return Rollout("train", 0, episodes, aborted, {"generation": 2.0, "other": float(len(groups))})


def collected(play: Play, resample: int):
    return play_until_signal(play, TrainingRollouts(tasks=3, group_size=2, resample=resample))


def test_nothing_more_is_played_where_nothing_is_missing():
    play = Play(0, 1, 2)
    rollout, found = collected(play, 5)
    assert play.asked == [[0, 1, 2]]
    assert found == Resampling(rounds=0, groups=0, signal=3)
    assert rollout.seconds == {"generation": 2.0, "other": 3.0}


def test_each_round_plays_as_many_groups_as_are_missing_until_there_are_enough():
    play = Play(1, 4, 5)
    rollout, found = collected(play, 5)
    assert play.asked == [[0, 1, 2], [3, 4], [5]]
    assert found == Resampling(rounds=2, groups=3, signal=3)
    assert found.metrics() == {
        "rollout/resample_rounds": 2,
        "rollout/resampled_groups": 3,
        "rollout/signal_groups": 3,
    }
    keys = [(item.group, item.index) for item in rollout.episodes]
    assert keys == [(group, index) for group in range(6) for index in range(2)], "all that was played, in its order"
    assert len(rollout.aborted) == 3
    assert rollout.seconds == {"generation": 6.0, "other": 6.0}


def test_the_bound_ends_it():
    play = Play(1)
    assert collected(play, 2)[1] == Resampling(rounds=2, groups=4, signal=1)
    assert play.asked == [[0, 1, 2], [3, 4], [5, 6]]
    play = Play(1)
    assert collected(play, 0)[1] == Resampling(rounds=0, groups=0, signal=1)
    assert play.asked == [[0, 1, 2]]


def test_a_shortage_is_told_once_with_its_numbers():
    settings, watch = TrainingRollouts(tasks=3, resample=2), Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.signal(Resampling(2, 4, 3), settings)
    told = "after 2 further rounds with 4 fresh tasks, only 1 groups of data.rollouts.tasks=3.*resample .now 2"
    with pytest.warns(UserWarning, match=told):
        watch.signal(Resampling(2, 4, 1), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.signal(Resampling(2, 4, 0), settings)


def test_replay_is_in_proportion_to_the_batch_and_not_to_all_that_was_played():
    asked = []

    class Counted(Mix):
        def quota(self, usable: int, capacity: int, fresh: int) -> int:
            asked.append(fresh)
            return super().quota(usable, capacity, fresh)

    episodes = [scored(group, index, False) for group in range(5) for index in range(2)]
    for item in episodes[4:]:
        item.in_batch = False
    buffer = ReplayBuffer(schedule=Counted())
    draw_and_admit(buffer, RewardBaseline(), episodes, {}, 0, seed=0, has_tools=True)
    assert asked == [4]

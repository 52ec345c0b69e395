from __future__ import annotations

import warnings

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from spear_lightning.algorithm import GRPO, Drain, GiGPO, Mix, QualityFilters, ReplayBuffer, RewardComposer
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.checks import check_advantage, check_replay


def test_a_buffer_that_can_never_replay_is_refused_with_the_numbers():
    """Maths with 32 x 16 episodes, as it was shipped once: 3 072 can never be reached within five iterations."""
    buffer = ReplayBuffer(capacity=2048, max_age=5, schedule=Drain(1.5))
    with pytest.raises(MisconfigurationException) as error:
        check_replay(buffer, QualityFilters(), TrainingRollouts(32, 16), samples_per_episode=1)
    message = str(error.value)
    for part in ("3072", "24 groups", "15 episodes", "max_age = 5", "at most 1800", "would never replay", "capacity"):
        assert part in message


def test_a_buffer_that_waits_for_most_of_what_there_is_warns():
    buffer = ReplayBuffer(capacity=1000, max_age=5, schedule=Drain(1.5))
    with pytest.warns(UserWarning, match="more than 83% of these succeed"):
        check_replay(buffer, QualityFilters(), TrainingRollouts(32, 16), samples_per_episode=1)


@pytest.mark.parametrize(
    ("buffer", "rollouts", "samples"),
    [
        (ReplayBuffer(2048, 7, Drain(1.5)), TrainingRollouts(32, 8), 50),  # ALFWorld as published
        (ReplayBuffer(2048, 7, Drain(1.5)), TrainingRollouts(32, 8), 15),  # WebShop
        (ReplayBuffer(2048, 7, Drain(1.5)), TrainingRollouts(128, 16), 1),  # maths
        (ReplayBuffer(256, 5, Mix(0.5)), TrainingRollouts(16, 8), 1),  # the quickstart
    ],
)
def test_what_can_replay_is_let_be(buffer, rollouts, samples):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_replay(buffer, QualityFilters(), rollouts, samples)


def test_groups_of_one_have_no_deviation():
    with pytest.raises(MisconfigurationException, match=r"data\.rollouts\.group_size is 1.*normalize_std"):
        check_advantage(GRPO(), RewardComposer(), TrainingRollouts(8, 1), False)
    check_advantage(GRPO(normalize_std=False), RewardComposer(), TrainingRollouts(8, 1), False)


def test_a_deviation_that_penalties_make_is_told_where_it_is_divided_by():
    with pytest.warns(UserWarning, match=r"valid turn there is reinforced as strongly as a winning one"):
        check_advantage(GiGPO(mode="mean_std_norm"), RewardComposer(), TrainingRollouts(), True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_advantage(GiGPO(mode="mean_std_norm"), RewardComposer(), TrainingRollouts(), False)
        check_advantage(GRPO(), RewardComposer(invalid_penalty=0.0), TrainingRollouts(), True)
        check_advantage(GiGPO(), RewardComposer(), TrainingRollouts(), True)

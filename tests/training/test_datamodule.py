from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.algorithm import ReplayBuffer, RewardBaseline
from spear_lightning.data.scoring import GroupStatistics
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.math import MathProblems
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.datamodule import RolloutDataModule


def made(agent: Any = None, **settings: Any) -> RolloutDataModule:
    return RolloutDataModule(MathProblems(), agent or ChatToolAgent(), HuggingFaceEngine(), **settings)


def test_the_longest_response_is_bounded_by_turn_and_episode() -> None:
    turns = {"max_turns": 8, "max_response_tokens": 100}
    assert made(**turns).max_response_length == 800
    assert made(**turns, max_episode_tokens=300).max_response_length == 300
    assert made(**turns, max_episode_tokens=3000).max_response_length == 800
    assert made(StepwiseAgent(), **turns, max_episode_tokens=50).max_response_length == 100


@pytest.mark.parametrize("name", ["max_episode_tokens", "max_active"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=rf"RolloutDataModule.{name} must be at least 1, not 0"):
        made(**{name: 0})


@pytest.mark.parametrize(("current", "seen"), [(True, [3.0, 5.0]), (False, [0.0, 3.0])])
def test_an_iterations_groups_enter_the_baseline_before_or_after_its_draw(current: bool, seen: list[float]) -> None:
    logged: dict[str, float] = {}
    data = made(StepwiseAgent(), baseline=RewardBaseline(current=current), replay=ReplayBuffer())
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(record_counts=logged.update))
    found = []
    for iteration, mean in enumerate([3.0, 7.0]):
        rollout = Rollout("train", iteration, [], [], {})
        statistics = GroupStatistics(np.array([mean]), np.ones(1), np.ones(1, bool))
        data._draw_and_admit(rollout, {}, statistics, iteration)
        found.append(logged["replay/p50"])
    assert found == seen
    assert data.baseline.median == 5.0

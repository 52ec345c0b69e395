from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from spear_lightning.datamodule import RolloutDataModule
from spear_lightning.engines.huggingface import HuggingFaceEngine
from spear_lightning.environments.math import MathProblems
from spear_lightning.rollout.chat_tools import ChatToolAgent
from spear_lightning.rollout.stepwise import StepwiseAgent


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
    with pytest.raises(MisconfigurationException, match=rf"data.{name} must be at least 1, not 0"):
        made(**{name: 0})

"""What a rollout is summarised by."""

from __future__ import annotations

import pytest
import torch

from spear_lightning.metrics.rollout import record_rollout
from spear_lightning.metrics.store import MetricStore
from spear_lightning.rollout.episode import Rollout
from tests.data.made import make_episode, make_turn


def test_turns_and_episodes_are_counted_each_as_what_they_are() -> None:
    cut = make_turn(shortened="history", valid=False)
    episodes = [
        make_episode(0, 0, success=True),
        make_episode(0, 1, turns=0, status="truncated", reason="overlong"),
        make_episode(0, 2, success=False),
    ]
    episodes[2].turns = [cut, cut, make_turn(5)]
    aborted = [make_episode(0, 3, status="aborted")]
    store = MetricStore()
    record_rollout(store, Rollout("validation", 0, episodes, aborted, {"generation": 2.0}))
    values = store.compute(torch.device("cpu"))
    expected = {
        "success": 1 / 3,
        "turns": 5 / 3,
        "tokens": (6 + 11) / 3,
        "overlong": 1 / 3,
        "invalid": 2 / 5,
        "shortened": 2 / 5,
        "response_length": 17 / 5,
        "episodes": 3,
        "aborted": 1,
        "tokens_per_second": 17 / 2,
    }
    assert {name: values[f"validation/{name}"] for name in expected} == pytest.approx(expected)

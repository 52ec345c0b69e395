"""What is configured to act and never does says so, once."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from spear_lightning.algorithm import ClipCov, KLCov, PPOClip
from spear_lightning.training.watch import Watch


def module(**changes):
    values = {"loss": PPOClip(), "replay_loss": PPOClip(), "imitation_weight": 1.0, "tool_reward": 0.0} | changes
    data = SimpleNamespace(tool_reward_weight=values.pop("tool_reward"))
    return SimpleNamespace(**values, trainer=SimpleNamespace(datamodule=data))


CASES = {
    "model.loss": (module(loss=ClipCov()), {"update/tokens": 9.0}, {"update/cov_fraction": 0.02}),
    "model.replay_loss": (module(replay_loss=ClipCov()), {"replay/tokens": 9.0}, {"replay/cov_fraction": 0.02}),
    "data.replay": (module(), {"replay/used": 0.0, "replay/size": 700.0, "replay/p50": 0.5}, {"replay/used": 3.0}),
    "CurriculumSchedule": (module(tool_reward=0.5), {"reward/tool": 0.0}, {"reward/tool": 0.01}),
}


@pytest.mark.parametrize("key", CASES)
def test_twenty_idle_iterations_are_told_once(key):
    trained, idle, _ = CASES[key]
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            watch.idle_parts(trained, idle)
    with pytest.warns(UserWarning, match=f"{key}.* has not acted for 20 iterations"):
        watch.idle_parts(trained, idle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(50):
            watch.idle_parts(trained, idle)


@pytest.mark.parametrize("key", CASES)
def test_whatever_acts_now_and_then_is_left_alone(key):
    trained, idle, acting = CASES[key]
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            for _ in range(19):
                watch.idle_parts(trained, idle)
            watch.idle_parts(trained, idle | acting)


def test_what_had_nothing_to_act_on_is_left_alone():
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            watch.idle_parts(module(loss=ClipCov(), replay_loss=ClipCov()), {"update/tokens": 0.0})  # all was filtered
            watch.idle_parts(module(imitation_weight=0.0), {"replay/used": 0.0})
            watch.idle_parts(module(loss=KLCov()), {"update/tokens": 9.0, "update/cov_fraction": 0.0})

from __future__ import annotations

import pytest

from spear_lightning.training.learning_rate import LearningRateSchedule


def test_warm_up_then_constant():
    assert [LearningRateSchedule(warmup=4).factor(update) for update in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_cosine_reaches_its_floor_and_stays():
    schedule = LearningRateSchedule(warmup=2, horizon=12, floor=0.1)
    assert schedule.factor(7) == pytest.approx(0.55)
    assert schedule.factor(12) == schedule.factor(500) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "key"), [({"warmup": -1}, "warmup"), ({"horizon": 0}, "horizon"), ({"floor": 2}, "floor")]
)
def test_bad_settings_name_their_key(arguments, key):
    with pytest.raises(ValueError, match=key):
        LearningRateSchedule(**arguments)

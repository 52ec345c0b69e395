import pytest

from spear_lightning.algorithm import Constant, CosineDecay, CosineWarmup, Zero, cosine_decay, cosine_warmup


@pytest.mark.parametrize(
    ("t", "decay"), [(0, 1.0), (50, 0.8535533905932737), (100, 0.5), (200, 0.0), (201, 0.0), (10**6, 0.0)]
)
def test_cosines_by_hand(t, decay):
    assert cosine_decay(t, 200) == pytest.approx(decay, abs=1e-15)
    assert cosine_warmup(t, 200) == pytest.approx(1 - decay, abs=1e-15)
    assert CosineDecay(200, start=3.0)(t) == pytest.approx(3 * decay, abs=1e-15)
    assert CosineWarmup(200, peak=0.5)(t) == pytest.approx(0.5 * (1 - decay), abs=1e-15)


def test_no_horizon_means_over_at_once():
    assert cosine_decay(0, 0) == 0.0
    assert cosine_warmup(0, 0) == 1.0


def test_modes_without_a_curve():
    assert [Zero()(t) for t in (0, 99)] == [0.0, 0.0]
    assert [Constant()(t) for t in (0, 99)] == [1.0, 1.0]
    assert Constant(0.3)(5) == 0.3


def test_negative_arguments_are_refused():
    for call in (
        lambda: cosine_decay(-1, 3),
        lambda: cosine_warmup(0, -3),
        lambda: CosineDecay(-1),
        lambda: CosineWarmup(-1),
    ):
        with pytest.raises(ValueError, match="at least 0"):
            call()

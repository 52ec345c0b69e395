import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_lightning.metrics.intervals import newcombe, wilson


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


# Newcombe, Statistics in Medicine 17 (1998) 873-890, table II, method 10; his difference is p1 - p2.
@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)],
)
def test_newcombe_gives_the_published_intervals(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    assert newcombe(second, first) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.01, 0.999))
def test_wilson_contains_the_rate_and_is_symmetric(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    low, high = wilson(successes, n, confidence)
    assert 0.0 <= low < high <= 1.0
    if n:
        assert low <= successes / n <= high
    mirrored = wilson(n - successes, n, confidence)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_the_interval_narrows_with_games_and_widens_with_confidence() -> None:
    widths = [high - low for low, high in (wilson(n // 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert wilson(5, 10, 0.5)[1] < wilson(5, 10, 0.95)[1] < wilson(5, 10, 0.99)[1]


def test_no_games_tell_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert newcombe((0, 0), (3, 10)) == (-1.0, 1.0)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 0.0), (1, 2, 1.0)])
def test_impossible_arguments_are_refused(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        wilson(successes, n, confidence)

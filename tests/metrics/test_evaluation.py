"""What several attempts are worth, by hand-computed cases; intervals that resample tasks."""

from __future__ import annotations

import itertools
import math

import pytest

from spear_lightning.metrics.evaluation import EpisodeRecord, majority, summarize
from spear_lightning.metrics.intervals import bootstrap, pass_at_k


def record(task: str, success: bool, answer: str = "", **changes: object) -> EpisodeRecord:
    values: dict[str, object] = {
        "task_type": "",
        "score": float(success),
        "turns": 2,
        "tokens": 10,
        "tool_calls": 1,
        "invalid": 0,
    }
    return EpisodeRecord(task=task, success=success, answer=answer, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, c):
    attempts = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(attempts, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_impossible_numbers_is_an_error():
    for numbers in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="cannot be estimated"):
            pass_at_k(*numbers)


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    import numpy as np

    generator, covered = np.random.default_rng(5), 0
    for trial in range(200):
        low, high = bootstrap(generator.normal(0.3, 1, 60), 0.9, resamples=500, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.84 <= covered / 200 <= 0.95
    assert bootstrap([0.5]) == (0.5, 0.5)
    assert bootstrap([0.0, 1.0, 1.0], seed=3) == bootstrap([0.0, 1.0, 1.0], seed=3)
    with pytest.raises(ValueError, match="nothing to resample"):
        bootstrap([])


def test_majority_votes():
    assert majority([record("a", True, "4"), record("a", True, "4"), record("a", False, "5")]) == 1
    assert majority([record("a", True, "4"), record("a", False, "5"), record("a", False, "5")]) == 0
    assert majority([record("a", True, "4"), record("a", False, "5")]) == 0.5
    assert majority([record("a", False, ""), record("a", False, ""), record("a", True, "4")]) == 1, "no answer, no vote"
    assert majority([record("a", False, "")]) == 0


def test_attempts_are_averaged_by_task():
    records = [
        *(record("easy", True, "1", turns=4, invalid=1) for _ in range(4)),
        record("hard", True, "7", task_type="other"),
        *(record("hard", False, "8", task_type="other") for _ in range(3)),
    ]
    found = summarize(list(reversed(records)))
    assert found == summarize(records), "the order in which ranks have played does not matter"
    assert (found.episodes, found.tasks, found.attempts) == (8, 2, 4)
    assert found.success.mean == pytest.approx((1 + 0.25) / 2)
    assert {k: estimate.mean for k, estimate in found.pass_at.items()} == pytest.approx({1: 0.625, 2: 0.75, 4: 1.0})
    assert found.majority is not None
    assert found.majority.mean == 0.5
    assert found.turns == 3
    assert found.invalid == pytest.approx(4 / 24)
    assert (found.success.low, found.success.high) == (0.25, 1.0), "two tasks tell little, however often each is played"


def test_single_attempts_have_neither_pass_at_k_nor_votes():
    found = summarize([record("a", True, "1"), record("b", False)])
    assert found.pass_at == {}
    assert found.majority is None
    assert math.isclose(found.success.mean, 0.5)
    uneven = summarize([record("a", True), record("a", False), record("b", False)])
    assert uneven.attempts == 1, "an attempt that was aborted is missing"
    with pytest.raises(ValueError, match="no episode"):
        summarize([])

from __future__ import annotations

import pytest

from spear_lightning.metrics import MetricStore


def test_weighted_means_sums_and_maxima():
    store = MetricStore()
    store.mean("a", 1.0, 3)
    store.mean("a", 0.0, 1)
    store.sum("b", 2)
    store.sum("b", 3)
    store.max("c", -1)
    store.max("c", -4)
    store.mean("nothing", 5.0, 0)
    assert store.compute() == {"a": 0.75, "b": 5.0, "c": -1.0}
    assert store.compute() == {}


def test_a_name_has_one_kind():
    store = MetricStore()
    store.sum("a", 1)
    with pytest.raises(ValueError, match="'a' is a sum"):
        store.mean("a", 1)

from __future__ import annotations

import pytest
import torch

from spear_lightning.metrics.store import MetricStore


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


def test_tensors_are_taken_as_they_were_and_looked_at_once():
    store = MetricStore()
    value, weight = torch.tensor(1.0, requires_grad=True), torch.tensor(3)
    store.mean("a", value * 1, weight)
    store.mean("a", torch.tensor(0.0, dtype=torch.float64), 1)
    store.max("b", torch.tensor(2.0, dtype=torch.bfloat16))
    store.max("b", 1.0)
    store.sum("c", torch.tensor(float("nan")))
    store.sum("c", torch.tensor([5]))
    weight.zero_()
    assert store.compute() == {"a": 0.75, "b": 2.0, "c": 5.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_on_a_gpu_and_off_it():
    store = MetricStore()
    store.mean("a", torch.tensor(1.0, device="cuda"), torch.tensor(3.0))
    store.mean("a", 0.0)
    assert store.compute(torch.device("cuda")) == {"a": 0.75}

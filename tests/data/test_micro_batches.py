from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.data.micro_batches import MicroBatch, empty_micro_batch, pack, split_minibatches
from spear_lightning.data.samples import Sample

PAD = 9


def make_row(length: int, number: int) -> Sample:
    """A row whose first id is its number and whose other numbers all differ."""
    random = np.random.default_rng(number)
    ids = random.integers(10, 99, length).astype(np.int32)
    ids[0] = 1000 + number
    turns = random.integers(-1, 4, length).astype(np.int16)
    generated = turns >= 0
    return Sample(
        ids=ids,
        mask=generated & (random.random(length) < 0.8),
        logps=np.where(generated, -random.random(length), 0).astype(np.float32),
        advantages=np.where(generated, random.normal(size=length), 0).astype(np.float32),
        turns=turns,
    )


def make_rows(lengths: list[int]) -> list[Sample]:
    return [make_row(length, number) for number, length in enumerate(lengths)]


def cost(batch: MicroBatch) -> int:
    return batch.input_ids.numel()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 60), max_size=40), st.integers(1, 200))
def test_every_row_is_packed_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = make_rows(lengths)
    batches = pack(rows, pad_id=PAD, max_tokens=budget, source="fresh")
    seen = Counter(int(row) for batch in batches for row in batch.input_ids[:, 0])
    assert seen == Counter(int(row.ids[0]) for row in rows)
    for batch in batches:
        assert cost(batch) <= budget or len(batch.input_ids) == 1
    assert sum(batch.tokens for batch in batches) == sum(lengths)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(30, 200))
def test_rows_keep_every_number_and_padding_is_neutral(lengths: list[int], budget: int) -> None:
    rows = make_rows(lengths)
    for batch in pack(rows, pad_id=PAD, max_tokens=budget, source="replay"):
        assert batch.source == "replay"
        for number in range(len(batch.input_ids)):
            row = rows[int(batch.input_ids[number, 0]) - 1000]
            end = len(row)
            pairs = (
                (batch.input_ids, row.ids, PAD),
                (batch.attention_mask, np.ones(end), 0),
                (batch.response_mask, row.mask, 0),
                (batch.old_logps, row.logps, 0),
                (batch.advantages, row.advantages, 0),
                (batch.turns, row.turns, -1),
            )
            for tensor, array, padding in pairs:
                assert np.array_equal(tensor[number, :end].numpy(), array)
                assert (tensor[number, end:] == padding).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(60, 300))
def test_packing_is_tight_and_balanced(lengths: list[int], budget: int) -> None:
    batches = pack(make_rows(lengths), pad_id=PAD, max_tokens=budget, source="fresh")
    plain, start, descending = 0, 0, sorted(lengths, reverse=True)
    while start < len(descending):
        start += budget // descending[start]
        plain += 1
    assert len(batches) == plain
    # No smaller budget would do with as few micro-batches.
    largest = max(map(cost, batches))
    if largest > max(lengths):
        tighter = pack(make_rows(lengths), pad_id=PAD, max_tokens=largest - 1, source="fresh")
        assert len(tighter) > plain


def test_equal_rows_are_spread_evenly() -> None:
    batches = pack(make_rows([10] * 9), pad_id=PAD, max_tokens=80, source="fresh")
    assert [len(batch.input_ids) for batch in batches] == [5, 4]


def test_row_over_the_budget_goes_alone() -> None:
    batches = pack(make_rows([5, 50, 5, 40]), pad_id=PAD, max_tokens=12, source="fresh")
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 50), (1, 40), (2, 5)]


def test_dtypes_and_device() -> None:
    [batch] = pack(make_rows([4, 3]), pad_id=PAD, max_tokens=100, source="fresh")
    dtypes = {"input_ids": torch.int64, "attention_mask": torch.int64, "turns": torch.int16}
    for name in ("input_ids", "attention_mask", "response_mask", "old_logps", "advantages", "turns"):
        assert getattr(batch, name).dtype == dtypes.get(name, torch.float32)
        assert getattr(batch, name).shape == (2, 4)
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.turns.device.type == "meta"
    assert (moved.source, moved.weights) == ("fresh", None)


def test_weights_are_one_where_rows_have_none() -> None:
    rows = make_rows([3, 2, 4])
    rows[1] = replace(rows[1], weights=np.array([1, 0.5], np.float32))
    [batch] = pack(rows, pad_id=PAD, max_tokens=100, source="fresh")
    assert batch.weights is not None
    assert batch.weights.dtype == torch.float32
    assert batch.weights.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0.5, 1, 1]]
    assert batch.to("meta").weights.device.type == "meta"


def test_empty_micro_batch_attends_and_has_no_loss() -> None:
    batch = empty_micro_batch(PAD, source="replay")
    assert batch.input_ids.tolist() == [[PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1]]
    assert not batch.response_mask.any()
    assert batch.turns.tolist() == [[-1, -1]]
    assert batch.source == "replay"
    assert {tensor.dtype for tensor in (batch.response_mask, batch.old_logps, batch.advantages)} == {torch.float32}


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        pack([], pad_id=PAD, max_tokens=0, source="fresh")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=8), unique=True, max_size=60), st.integers(1, 9), st.integers(0, 2**60))
def test_minibatches_are_near_equal_and_independent_of_order(keys: list[str], count: int, seed: int) -> None:
    deal = split_minibatches(keys, count, seed)
    assert set(deal) == set(keys)
    sizes = [list(deal.values()).count(number) for number in range(count)]
    assert sum(sizes) == len(keys)
    assert max(sizes) - min(sizes) <= 1
    assert split_minibatches(sorted(keys, reverse=True), count, seed) == deal


def test_deals_differ_by_seed_and_mix_neighbours() -> None:
    keys = [(group, index) for group in range(8) for index in range(8)]
    one, other = split_minibatches(keys, 2, 1), split_minibatches(keys, 2, 2)
    assert one != other
    assert 8 < sum(one[key] for key in keys[:32]) < 24
    assert split_minibatches(list(range(5)), 2, 0).keys() == set(range(5))


def test_bad_deals_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct keys"):
        split_minibatches(["a", "a"], 2, 0)
    with pytest.raises(ValueError, match="must be at least 1"):
        split_minibatches(["a"], 0, 0)

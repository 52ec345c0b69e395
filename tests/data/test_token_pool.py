"""Rows that are put away come back as they were, take little, and survive a checkpoint of any version."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm import ReplayBuffer, ReplayEntry
from spear_lightning.checkpoint.rank_state import RankFiles, load_replay, replay_to_state
from spear_lightning.data.samples import Sample
from spear_lightning.data.token_pool import StoredSample, TokenPool, store_samples


def same(one: Sample, other: Sample) -> bool:
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in fields(Sample))
    return all(a is b if a is None or b is None else a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def row_of(random: np.random.Generator, prompt: np.ndarray, turn: int = 0, responses: int = 1) -> Sample:
    """Prompts and responses in turn, the last of them out of the loss, every advantage 0.25."""
    ids, mask, logps, turns = [], [], [], []
    for number in range(responses):
        length = int(random.integers(1, 6))
        ids += [prompt, random.integers(0, 50, length)]
        mask += [np.zeros(len(prompt), bool), np.full(length, number < 1)]
        logps += [np.zeros(len(prompt)), -random.random(length)]
        turns += [np.full(len(prompt), -1), np.full(length, turn + number)]
    numbers = np.concatenate(turns).astype(np.int16)
    return Sample(
        ids=np.concatenate(ids).astype(np.int32),
        mask=np.concatenate(mask),
        logps=np.concatenate(logps).astype(np.float32),
        advantages=np.where(numbers >= 0, np.float32(0.25), np.float32(0)),
        turns=numbers,
    )


def weighed(row: Sample) -> Sample:
    return replace(row, weights=np.where(row.turns >= 0, -row.logps, np.float32(1)))


def stepwise_rows(count: int, seed: int = 0) -> list[Sample]:
    """A common beginning, and a window that moves over a history: what each prompt of an episode is made of."""
    random = np.random.default_rng(seed)
    head, history = random.integers(0, 1000, 120), random.integers(0, 1000, 40 * (count + 2))
    return [row_of(random, np.concatenate([head, history[40 * n : 40 * (n + 3)]]), n) for n in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=60), max_size=6), st.integers(0, 3))
def test_every_sequence_comes_back(sequences: list[list[int]], period: int) -> None:
    # Few different tokens: repetitions of themselves and of each other everywhere, overlapping ones too.
    pool = TokenPool()
    arrays = [np.array(sequence * (period + 1), np.int32) for sequence in sequences]
    slices = [pool.add(array) for array in arrays]
    pool.complete()
    for array, where in zip(arrays, slices, strict=True):
        taken = pool.take(where)
        assert taken.dtype == np.int32
        np.testing.assert_array_equal(taken, array)


def test_rows_come_back_bit_by_bit() -> None:
    random = np.random.default_rng(1)
    rows = [
        *stepwise_rows(5),
        row_of(random, random.integers(0, 9, 7), responses=3),  # one turn in the loss, two not
        row_of(random, np.zeros(0, int), responses=2),  # nothing but what was generated, in two turns
        Sample(*(np.zeros(0, kind) for kind in (np.int32, bool, np.float32, np.float32, np.int16))),
        Sample(  # an episode that ends with an observation
            ids=np.arange(3, dtype=np.int32),
            mask=np.array([True, False, False]),
            logps=np.array([-1, 0, 0], np.float32),
            advantages=np.array([0.25, 0, 0], np.float32),
            turns=np.array([4, -1, -1], np.int16),
        ),
    ]
    rows += list(map(weighed, rows))
    for row, stored in zip(rows, store_samples(rows), strict=True):
        assert len(stored) == len(row)
        assert (stored.weights is None) == (row.weights is None)
        assert same(stored.with_advantage(0.25), row)


def test_what_rows_repeat_is_stored_once() -> None:
    rows = stepwise_rows(20)
    stored = store_samples(rows)
    new = 120 + 40 * 22 + sum(int((row.turns >= 0).sum()) for row in rows)
    assert len(stored[0].pool) == new
    assert sum(map(len, rows)) > 4 * new
    assert all(row.pool is stored[0].pool for row in stored)
    assert sum(len(row.slices) for row in stored) <= 4 * len(rows)


def test_equal_hashes_are_not_taken_for_equal_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_lightning.data.token_pool._FACTOR", np.uint64(0))  # all grams hash alike
    rows = stepwise_rows(4)
    for row, stored in zip(rows, store_samples(rows), strict=True):
        assert same(stored.with_advantage(0.25), row)


def test_a_complete_pool_takes_nothing_more() -> None:
    pool = TokenPool()
    pool.complete()
    with pytest.raises(ValueError, match="complete"):
        pool.add(np.zeros(3, np.int32))


# --- in checkpoints ---------------------------------------------------------------------------------------------------


def filled(count: int = 12, weights: bool = True) -> tuple[ReplayBuffer, dict[str, Sample]]:
    buffer, rows = ReplayBuffer(), stepwise_rows(count)
    if weights:
        rows[1::2] = map(weighed, rows[1::2])
    keys = [f"{n // 6}/desk/{n}" for n in range(count)]
    for iteration in (0, 1):
        mine = [n for n in range(count) if n // 6 == iteration]
        stored = store_samples(rows[n] for n in mine)
        buffer.add(
            [ReplayEntry(keys[n], row, 1.0, 0.25, iteration) for n, row in zip(mine, stored, strict=True)], iteration
        )
    return buffer, dict(zip(keys, rows, strict=True))


def rows_in(buffer: ReplayBuffer) -> dict[str, Sample]:
    entries = buffer.state_dict()["entries"]
    assert all(isinstance(entry["payload"], StoredSample) for entry in entries)
    return {entry["key"]: entry["payload"].with_advantage(0.25) for entry in entries}


def assert_same(found: dict[str, Sample], expected: dict[str, Sample]) -> None:
    assert found.keys() == expected.keys()
    assert all(same(found[key], expected[key]) for key in expected)


def test_a_buffer_comes_back_and_its_rows_share_their_pools(tmp_path: Any) -> None:
    buffer, rows = filled()
    torch.save(replay_to_state(buffer), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["pools"]) == 2  # of two iterations
    again = ReplayBuffer()
    load_replay(again, [state], 0, 1)
    assert list(rows_in(again)) == list(rows_in(buffer)), "in the same order"
    assert_same(rows_in(again), rows)
    assert len({id(entry["payload"].pool) for entry in again.state_dict()["entries"]}) == 2


def test_entries_dealt_over_other_ranks_leave_the_rest_of_their_pool() -> None:
    buffer, rows = filled()
    dealt = [ReplayBuffer() for _ in range(3)]
    for rank, mine in enumerate(dealt):
        load_replay(mine, [replay_to_state(buffer)], rank, 3)
    together: dict[str, Sample] = {}
    for mine in dealt:
        assert not together.keys() & rows_in(mine).keys()
        together |= rows_in(mine)
        tokens = sum(len(row) for row in rows_in(mine).values())
        pools = {id(e["payload"].pool): len(e["payload"].pool) for e in mine.state_dict()["entries"]}
        assert sum(pools.values()) <= tokens
    assert_same(together, rows)


def test_a_buffer_from_before_there_were_weights_is_read() -> None:
    buffer, rows = filled(weights=False)
    state = {**replay_to_state(buffer), "format": 2}
    assert all("weights" not in entry["payload"] for entry in state["entries"])
    again = ReplayBuffer()
    load_replay(again, [state], 0, 1)
    assert_same(rows_in(again), rows)


@pytest.mark.parametrize(("changes", "named"), [({"format": 4}, "format 4"), ({"format": None}, "format None")])
def test_a_buffer_of_another_format_is_refused(changes: dict[str, Any], named: str) -> None:
    state = {**replay_to_state(filled()[0]), **changes}
    with pytest.raises(ValueError, match=rf"the replay buffer .*{named}.*reads 3 and 2.*spear export"):
        load_replay(ReplayBuffer(), [state], 0, 1)


def test_a_buffer_of_an_older_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format 1,.*reads 3 and 2"):
        load_replay(ReplayBuffer(), [{"entries": []}], 0, 1)


def test_a_rank_file_of_an_older_checkpoint_is_refused(tmp_path: Any) -> None:
    torch.save({"entries": []}, tmp_path / "rank-00000.pt")
    with pytest.raises(ValueError, match=r"rank 0 held \(replay\).*rank-00000.pt: it was written by another version"):
        RankFiles(tmp_path, "replay")[0]

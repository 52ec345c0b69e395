import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.algorithm import (
    BaselineRecalibration,
    Decay,
    Drain,
    Mix,
    ReplayBuffer,
    ReplayEntry,
    RewardBaseline,
)


def entry(key, reward=10.0, advantage=1.0, iteration=0):
    return ReplayEntry(str(key), {"ids": torch.tensor([1, 2])}, reward, advantage, iteration)


def keys(drawn):
    return [one.entry.key for one in drawn]


def baseline(*means, stds=None):
    made = RewardBaseline()
    made.update(means, stds)
    return made


ALL = Mix(ratio=1.0)


def test_baseline_is_the_median_of_the_last_groups():
    made = RewardBaseline(capacity=3)
    assert made.median == 0.0
    assert made.std_median == 1.0
    made.update([1.0, 2.0], [0.0, 4.0])
    assert made.median == 1.5
    made.update([5.0, 9.0], [6.0, 0.0])  # the first group is forgotten
    assert made.median == 5.0
    assert made.std_median == 5.0  # of 4 and 6: groups without a deviation do not count
    assert len(made) == 3


def test_baseline_state_round_trip():
    made = baseline(0.1, 0.7, 3.0, stds=[0.0, 0.2, 0.3])
    copy = RewardBaseline()
    copy.load_state_dict(made.state_dict())
    assert (copy.median, copy.std_median, len(copy)) == (made.median, made.std_median, 3)
    copy.update([9.0], [1.0])
    assert len(made) == 3
    small = RewardBaseline(capacity=1)
    small.load_state_dict(made.state_dict())
    assert small.median == 3.0


def test_only_positive_advantages_are_admitted():
    buffer = ReplayBuffer()
    offered = [entry(0, advantage=0.0), entry(1, advantage=-1.0), entry(2, advantage=float("nan")), entry(3)]
    assert buffer.add(offered, 0) == 1
    assert keys(buffer.usable(0, baseline(0.0))) == ["3"]


def test_entries_expire():
    buffer = ReplayBuffer(max_age=2, schedule=ALL)
    buffer.add([entry("old", iteration=0)], 0)
    buffer.add([entry("new", iteration=1)], 1)
    assert sorted(keys(buffer.draw(2, baseline(0.0), seed=0, fresh=9))) == ["new", "old"]
    assert keys(buffer.usable(3, baseline(0.0))) == ["new"]
    assert keys(buffer.draw(3, baseline(0.0), seed=0, fresh=9)) == ["new"]
    assert len(buffer) == 1
    buffer.add([], 4)
    assert len(buffer) == 0


def test_over_capacity_the_oldest_go_first():
    buffer = ReplayBuffer(capacity=3, schedule=ALL)
    for iteration in range(5):
        buffer.add([entry(f"{iteration}/{n}", iteration=iteration) for n in range(2)], iteration)
    kept = Counter(one.entry.iteration for one in buffer.usable(4, baseline(0.0)))
    assert kept == {4: 2, 3: 1}


def test_recalibration():
    buffer = ReplayBuffer(schedule=ALL)
    buffer.add([entry("great", reward=10.0), entry("usual", reward=4.0), entry("poor", reward=1.0)], 0)
    now = baseline(3.0, 4.0, 9.0, stds=[0.0, 1.0, 3.0])
    assert {d.entry.key: d.advantage for d in buffer.draw(0, now, seed=0, fresh=9)} == {"great": 3.0}
    buffer.recalibration = BaselineRecalibration(normalize_std=False)
    assert {d.entry.key: d.advantage for d in buffer.draw(0, now, seed=0, fresh=9)} == {"great": 6.0}
    # What the baseline has overtaken stays: it may fall again.
    assert len(buffer.draw(0, baseline(0.0), seed=0, fresh=9)) == 3


def test_what_is_outgrown_is_replayed_where_it_is_not_filtered():
    entries = [entry("great", reward=10.0), entry("usual", reward=4.0), entry("poor", reward=1.0)]
    everything = ReplayBuffer(schedule=ALL, filter_outgrown=False)
    everything.add([*entries, entry("loss", advantage=-1.0)], 0)
    drawn = everything.draw(0, baseline(4.0), seed=0, fresh=9)
    assert {one.entry.key: one.advantage for one in drawn} == {"great": 6.0, "usual": 0.0, "poor": -3.0}
    full = ReplayBuffer(capacity=2, schedule=Drain(ready=1.5), filter_outgrown=False)
    full.add(entries, 0)
    assert len(full.draw(1, baseline(4.0), seed=0, fresh=9)) == 2, "they count as usable"


def test_division_by_the_deviation_does_not_blow_up_where_most_groups_fail():
    now = baseline(0.0, 0.0, 5.0, stds=[0.0, 0.0, 5.0])
    assert BaselineRecalibration()(entry("win", reward=10.0), now) == 2.0


def test_decay_weakens_the_old_advantage():
    buffer = ReplayBuffer(schedule=ALL, recalibration=Decay(0.5))
    buffer.add([entry("any", reward=-5.0, advantage=1.2)], 0)
    assert [d.advantage for d in buffer.draw(0, baseline(99.0), seed=0, fresh=1)] == [0.6]
    with pytest.raises(ValueError, match=r"Decay\.factor"):
        Decay(0.0)


def test_drain_waits_then_replays_then_starts_afresh():
    buffer = ReplayBuffer(capacity=4, schedule=Drain(ready=1.5))
    buffer.add([entry(n) for n in range(5)] + [entry("unusable", reward=0.0)], 0)
    assert buffer.draw(0, baseline(0.0), seed=0, fresh=8) == []
    assert len(buffer) == 6
    buffer.add([entry(5)], 1)  # now six are usable
    drawn = buffer.draw(1, baseline(0.0), seed=0, fresh=8)
    assert len(set(keys(drawn))) == 4
    assert len(buffer) == 0


def test_drain_holds_more_than_it_waits_for():
    buffer = ReplayBuffer(capacity=4, schedule=Drain(ready=1.5))
    buffer.add([entry(n) for n in range(50)], 0)
    assert len(buffer) == 12
    quick = ReplayBuffer(capacity=32, schedule=Drain(ready=1.0))
    quick.add([entry(n) for n in range(31)], 0)
    assert quick.draw(0, baseline(0.0), seed=0, fresh=64) == []
    quick.add([entry(31)], 0)
    assert len(quick.draw(0, baseline(0.0), seed=0, fresh=64)) == 32


def test_mix_replays_a_share_every_iteration_and_keeps_it():
    buffer = ReplayBuffer(schedule=Mix(ratio=0.25))
    buffer.add([entry(n) for n in range(20)], 0)
    first, second = (buffer.draw(t, baseline(0.0), seed=0, fresh=32) for t in (0, 1))
    assert len(first) == len(second) == 8
    assert keys(first) != keys(second)
    assert len(buffer) == 20


def test_draws_depend_on_seed_and_iteration_and_are_uniform():
    buffer = ReplayBuffer(schedule=Mix(ratio=1.0), max_age=10**6)
    buffer.add([entry(n) for n in range(10)], 0)
    now = baseline(0.0)
    assert keys(buffer.draw(3, now, seed=1, fresh=3)) == keys(buffer.draw(3, now, seed=1, fresh=3))
    assert keys(buffer.draw(3, now, seed=1, fresh=3)) != keys(buffer.draw(3, now, seed=2, fresh=3))
    counts = Counter(key for t in range(1000) for key in keys(buffer.draw(t, now, seed=7, fresh=3)))
    assert len(counts) == 10
    assert all(abs(count - 300) < 5 * (300 * 0.7) ** 0.5 for count in counts.values())


def on_ranks(buffers, call):
    """Run ``call(buffer, rank, gather)`` on a thread per rank, with a gather that joins them as a collective would."""
    meet = threading.Barrier(len(buffers), timeout=30)
    posted = [[] for _ in buffers]

    def run(rank):
        def gather(values):
            posted[rank] = list(values)
            meet.wait()
            joined = [value for values in posted for value in values]
            meet.wait()
            return joined

        return call(buffers[rank], rank, gather)

    with ThreadPoolExecutor(len(buffers)) as pool:
        return list(pool.map(run, range(len(buffers))))


@given(
    owners=st.lists(st.integers(0, 1), min_size=1, max_size=24),
    schedule=st.sampled_from([Mix(0.5), Mix(2.0), Drain(0.5), Drain(1.5)]),
    capacity=st.integers(1, 12),
    seed=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_two_ranks_hold_and_draw_what_one_would(owners, schedule, capacity, seed):
    entries = [entry(n, reward=float(n % 5), iteration=n % 3) for n in range(len(owners))]
    now = baseline(1.0)
    alone = ReplayBuffer(capacity, schedule=schedule)
    alone.add(entries, 2)
    pair = [ReplayBuffer(capacity, schedule=schedule) for _ in range(2)]
    shares = [[e for e, owner in zip(entries, owners, strict=True) if owner == rank] for rank in range(2)]
    on_ranks(pair, lambda buffer, rank, gather: buffer.add(shares[rank], 2, gather=gather))
    assert sum(map(len, pair)) == len(alone)

    drawn = on_ranks(pair, lambda buffer, _, gather: buffer.draw(2, now, seed=seed, fresh=8, gather=gather))
    expected = alone.draw(2, now, seed=seed, fresh=8)
    assert sorted(keys(drawn[0]) + keys(drawn[1])) == sorted(keys(expected))
    assert sum(map(len, pair)) == len(alone)


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(-1, 1), st.floats(-2, 12)), max_size=60), st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_what_is_held_and_drawn_is_always_allowed(offers, capacity):
    buffer = ReplayBuffer(capacity, max_age=2, schedule=Mix(0.5))
    now = RewardBaseline()
    for iteration in range(7):
        mine = [entry(n, r, a, t) for n, (t, a, r) in enumerate(offers) if t == iteration]
        now.update([r for t, _, r in offers if t == iteration])
        buffer.add(mine, iteration)
        assert len(buffer) <= capacity
        drawn = buffer.draw(iteration, now, seed=0, fresh=8)
        assert len(drawn) == len(set(keys(drawn))) <= 4
        for one in drawn:
            assert one.advantage == one.entry.reward - now.median > 0
            assert one.entry.advantage > 0
            assert iteration - one.entry.iteration <= 2


def test_state_round_trip_is_exact():
    buffer = ReplayBuffer(schedule=Mix(0.5))
    buffer.add([entry(n, reward=n + 0.1, iteration=n % 2) for n in range(9)], 1)
    buffer.draw(1, baseline(2.0), seed=0, fresh=8)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    copy = ReplayBuffer(schedule=Mix(0.5))
    copy.load_state_dict(torch.load(file, weights_only=True))
    assert len(copy) == len(buffer) == 9
    for t in (2, 3, 4):
        both = [b.draw(t, baseline(2.0), seed=0, fresh=8) for b in (buffer, copy)]
        assert keys(both[0]) == keys(both[1])
        assert [d.advantage for d in both[0]] == [d.advantage for d in both[1]]
        assert all(
            torch.equal(a.entry.payload["ids"], b.entry.payload["ids"])
            and replace(a.entry, payload=None) == replace(b.entry, payload=None)
            for a, b in zip(*both, strict=True)
        )
    assert len(copy) == len(buffer)


def test_a_state_with_more_than_an_entry_needs_is_read():
    """Of an older version, which counted how often each entry had been drawn."""
    buffer, copy = ReplayBuffer(), ReplayBuffer()
    buffer.add([entry("a")], 0)
    copy.load_state_dict({"entries": [{**saved, "uses": 3} for saved in buffer.state_dict()["entries"]]})
    assert keys(copy.usable(0, baseline(0.0))) == ["a"]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ReplayBuffer(capacity=0), r"ReplayBuffer\.capacity"),
        (lambda: ReplayBuffer(max_age=0), r"ReplayBuffer\.max_age"),
        (lambda: RewardBaseline(capacity=0), r"RewardBaseline\.capacity must be at least 1, not 0"),
        (
            lambda: RewardBaseline(percentile=101),
            r"RewardBaseline\.percentile must be at least 0 and at most 100, not 101",
        ),
        (
            lambda: RewardBaseline(percentile=-1),
            r"RewardBaseline\.percentile must be at least 0 and at most 100, not -1",
        ),
        (lambda: Drain(ready=0), r"Drain\.ready"),
        (lambda: Mix(ratio=-1), r"Mix\.ratio"),
    ],
)
def test_values_out_of_range_are_named(make, key):
    with pytest.raises(ValueError, match=key):
        make()


def test_an_empty_buffer_has_nothing_to_say():
    buffer = ReplayBuffer()
    assert buffer.draw(0, baseline(0.0), seed=0, fresh=8) == []
    assert len(buffer) == 0

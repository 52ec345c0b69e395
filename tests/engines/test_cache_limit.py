"""A key-value cache of limited size: who has to leave it has the same responses all the same."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from spear_lightning.engines.huggingface.cache_rows import SessionRows
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.engines.huggingface.kv_cache import KeyValueRows
from spear_lightning.engines.huggingface.memory import free_bytes
from spear_lightning.utils.randomness import stream_seed
from tests.engines.test_huggingface import VOCABULARY, Counting, check, engine_of, one_by_one, play, request

TOKEN = 2 * 2 * 2 * 8 * 4
"""Bytes of a token in the tiny Qwen2: keys and values, two layers, two heads of 8, float32."""


def gib(tokens: int) -> float:
    return (tokens + 0.5) * TOKEN / 2**30


@pytest.mark.parametrize("tokens", [60, 150, 400])
@pytest.mark.parametrize("settings", [{}, {"max_batch": 3}, {"keep_cache": False}], ids=str)
def test_episodes_under_a_tight_limit_equal_the_plain_computation(tiny_policy, tokens, settings):
    policy = tiny_policy()
    engine = engine_of(policy, cache_gib=gib(tokens), **settings)
    play(policy, engine)
    assert bool(engine.evicted) == (settings.get("keep_cache", True) and tokens < 400)


def test_the_episodes_that_waited_longest_leave(tiny_policy, caplog):
    policy = tiny_policy()
    engine, counting = engine_of(policy, cache_gib=gib(3 * 22)), Counting(policy)
    prompts = {name: np.arange(3, 23) + number for number, name in enumerate("abcd")}
    with caplog.at_level(logging.WARNING):
        for name in "abcab":
            engine.generate([request(name, prompts[name], max_new_tokens=1)])
        assert engine.evicted == 0
        counting.since()
        engine.generate([request("d", prompts["d"], max_new_tokens=1)])
    assert engine.evicted == 1
    assert "engine.cache_gib" in caplog.text
    counting.since()
    for name, fed in (("a", 1), ("b", 1), ("d", 1), ("c", 20)):
        engine.generate([request(name, prompts[name], max_new_tokens=1)])
        assert counting.since() == fed, name


def test_responses_that_grow_push_waiting_episodes_out(tiny_policy):
    policy = tiny_policy()
    engine = engine_of(policy, cache_gib=gib(6 * 20))
    waiting = [request(f"w{i}", [5 + i] * 12, i, max_new_tokens=2) for i in range(4)]
    growing = [request(f"g{i}", [9 + i] * 8, i, max_new_tokens=40, stop_ids=()) for i in range(2)]
    for asked in (waiting, growing, waiting):
        for one, given in zip(asked, engine.generate(asked), strict=True):
            check(given, one_by_one(policy, one))
    assert engine.evicted >= 4


def test_memory_does_not_grow(tiny_policy):
    policy = tiny_policy()
    engine = engine_of(policy, cache_gib=gib(200))
    rng = np.random.default_rng(0)
    engine.generate([request("first", [5])])
    cache = engine._rows.cache
    places = {buffer.untyped_storage().data_ptr() for buffer in cache.buffers}
    for turn in range(6):
        asked = [
            request(f"{turn % 3}/{i}", rng.integers(3, VOCABULARY, rng.integers(2, 40)), stream_seed(turn, i))
            for i in range(9)
        ]
        for one, given in zip(asked, engine.generate(asked), strict=True):
            check(given, one_by_one(policy, one))
    assert {buffer.untyped_storage().data_ptr() for buffer in cache.buffers} == places
    assert cache.rows * cache.columns <= 200
    assert sum(b.untyped_storage().nbytes() for b in cache.buffers) == 200 * TOKEN


def test_a_request_that_cannot_fit_alone(tiny_policy):
    engine = engine_of(tiny_policy(), cache_gib=gib(30))
    engine.generate([request("a", [5] * 24, max_new_tokens=6)])
    with pytest.raises(ValueError, match=r"session b: a prompt of 25 tokens and up to 6 .* engine\.cache_gib"):
        engine.generate([request("a", [5]), request("b", [5] * 25, max_new_tokens=6)])


def test_a_cache_that_is_larger_than_memory_is_refused(tiny_policy):
    policy, cpu = tiny_policy(), torch.device("cpu")
    with pytest.raises(ValueError, match=r"engine\.cache_gib is 1e\+06, but only .* GiB are free on cpu: lower it"):
        HuggingFaceEngine(cache_gib=1e6).sync(policy, 0)
    with pytest.raises(ValueError, match=r"engine\.cache_gib"):
        HuggingFaceEngine(cache_gib=1e6).prepare(policy, cpu)
    HuggingFaceEngine().prepare(policy, cpu)
    HuggingFaceEngine(cache_gib=0.001).prepare(policy, cpu)


@pytest.mark.parametrize("setting", [0.0, -1.0, float("nan")])
def test_bad_limit(setting):
    with pytest.raises(ValueError, match=r"HuggingFaceEngine\.cache_gib must be above 0"):
        HuggingFaceEngine(cache_gib=setting)


def test_free_memory_is_what_machine_and_control_group_leave(tmp_path: Path):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    cpu = torch.device("cpu")
    assert free_bytes(cpu, tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "1000\n")
    assert free_bytes(cpu, tmp_path) == 4000 * 1024
    write("sys/fs/cgroup/memory.max", "5000\n")
    assert free_bytes(cpu, tmp_path) == 4000
    assert free_bytes(torch.device("meta"), tmp_path) is None


def test_rows_keep_their_contents_in_another_shape():
    cache = KeyValueRows(capacity=24)
    cache.reserve(2, 3)
    states = torch.arange(2 * 2 * 3.0).view(2, 1, 3, 2)
    cache.open(slice(0, 2), torch.arange(3).expand(2, 3), 3)
    cache.update(states, -states, 0)
    for rows, columns in ((2, 12), (3, 8), (6, 4), (2, 3)):
        cache.resize(rows, columns)
        assert torch.equal(cache.buffers[0][:2, :, :3], states)
        assert torch.equal(cache.buffers[1][:2, :, :3], -states)
    with pytest.raises(ValueError, match="5 rows of 5 columns"):
        cache.resize(5, 5)


def test_who_continues_a_batch_keeps_its_row():
    rows = SessionRows()
    names = [rows.session(name) for name in "abcdef"]
    assert rows.allocate(names, range(0), 4) == range(6)
    assert rows.allocate(names[3:], range(0), 4) == range(3, 6), "the second half goes on where it stands"
    assert [session.row for session in names] == list(range(6))
    assert rows.allocate([names[5]], range(3), 4) == range(4)
    assert sorted(session.row for session in names) == list(range(6))

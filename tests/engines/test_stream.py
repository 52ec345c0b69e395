"""Requests that join while others are being answered get what they would get alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spear_lightning.engines.base import BatchStream
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.utils.randomness import stream_seed
from tests.engines.test_cache_limit import gib
from tests.engines.test_huggingface import VOCABULARY, Counting, check, engine_of, make, one_by_one, request


@pytest.mark.parametrize("kind", ["qwen2", "llama", "sliding"])
@pytest.mark.parametrize("settings", [{}, {"max_batch": 3}, {"keep_cache": False}, {"tokens": 130}], ids=str)
def test_sessions_that_join_and_leave_while_others_generate(tiny_policy, kind, settings):
    if tokens := settings.get("tokens"):
        settings = {"cache_gib": gib(tokens * (1 + (kind == "llama")))}
    policy = make(tiny_policy, kind)
    engine, rng = engine_of(policy, **settings), np.random.default_rng(3)
    stream = engine.stream()
    contexts = {f"s{i}": rng.integers(3, VOCABULARY, rng.integers(1, 12)) for i in range(6)}
    left = dict.fromkeys(contexts, 3)
    asked = {}

    def submit(names) -> None:
        for name in names:
            longest = 2 if name in ("s0", "s1") else 14
            asked[name] = request(name, contexts[name], stream_seed(name, left[name]), max_new_tokens=longest)
        stream.submit([asked[name] for name in names])

    submit(["s0", "s2", "s3"])
    late, overlapped = ["s1", "s4", "s5"], 0
    while stream.unfinished:
        if late:
            submit([late.pop()])
        given = stream.poll()
        overlapped += bool(given) and stream.unfinished > 0
        again = []
        for name, completion in given.items():
            check(completion, one_by_one(policy, asked[name]))
            contexts[name] = np.concatenate([asked[name].prompt_ids, completion.ids, rng.integers(3, VOCABULARY, 4)])
            left[name] -= 1
            (again.append if left[name] else engine.end)(name)
        submit(again)
    assert set(left.values()) == {0}
    assert overlapped >= 4, "they did leave while others went on"


def test_one_that_joins_costs_its_prompt_only(tiny_policy):
    policy = tiny_policy()
    engine, counting = engine_of(policy), Counting(policy)
    stream = engine.stream()
    stream.submit([request("long", [5, 6, 7], max_new_tokens=60, stop_ids=())])
    stream.poll()
    counting.since()
    stream.submit([request("short", [8] * 10, max_new_tokens=4, stop_ids=())])
    assert set(stream.poll()) == {"short"}
    assert counting.since() == 10 + 4 + 3
    assert set(stream.finish()) == {"long"}
    assert stream.unfinished == 0


def test_a_session_has_one_request_at_a_time(tiny_policy):
    stream = engine_of(tiny_policy()).stream()
    stream.submit([request("a", [5])])
    with pytest.raises(ValueError, match="session a has a request"):
        stream.submit([request("a", [5])])


def test_no_room_is_told_too(tiny_policy):
    stream = engine_of(tiny_policy(), max_length=4).stream()
    stream.submit([request("long", [5] * 4), request("short", [5])])
    given = stream.finish()
    assert len(given["long"].ids) == 0
    assert given["long"].finish == "length"
    assert len(given["short"].ids) > 0


def test_a_stream_that_is_closed_leaves_the_engine_whole(tiny_policy):
    policy = tiny_policy()
    engine = engine_of(policy)
    stream = engine.stream()
    asked = [request(name, [5, 6 + i, 7], i, stop_ids=()) for i, name in enumerate("abc")]
    stream.submit(asked)
    stream.poll()
    stream.close()
    assert stream.poll() == {}
    for one, given in zip(asked, engine.generate(asked), strict=True):
        check(given, one_by_one(policy, one))


def test_streaming_with_changed_weights_is_refused(tiny_policy):
    policy = tiny_policy()
    stream = engine_of(policy).stream()
    stream.submit([request("a", [5])])
    with torch.no_grad():
        next(policy.parameters()).add_(0)
    with pytest.raises(RuntimeError, match="sync"):
        stream.poll()
    with pytest.raises(RuntimeError, match="before sync"):
        HuggingFaceEngine().stream()


def test_engines_that_answer_whole_batches_have_a_stream(tiny_policy):
    engine = engine_of(tiny_policy())
    stream = BatchStream(engine)
    asked = [request(name, [5, 6, 7], i) for i, name in enumerate("ab")]
    stream.submit(asked[:1])
    stream.submit(asked[1:])
    assert stream.unfinished == 2
    given = stream.poll()
    assert stream.unfinished == 0
    assert stream.poll() == {}
    for one in asked:
        check(given[one.session], engine.generate([one])[0])
    stream.submit(asked)
    stream.close()
    assert stream.finish() == {}

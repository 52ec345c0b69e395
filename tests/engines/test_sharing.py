"""Prompts that begin alike: who takes over what from whom, and that nothing but the work changes by it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_lightning.engines.base import Request, Sampling
from spear_lightning.engines.huggingface import prefix_sharing as sharing
from spear_lightning.engines.huggingface.cache_rows import Session
from spear_lightning.engines.huggingface.jobs import Job
from spear_lightning.engines.huggingface.prefix_sharing import plan_prefill
from spear_lightning.policy.packing import common_length
from tests.engines.test_cache_limit import gib
from tests.engines.test_huggingface import KINDS, VOCABULARY, Counting, check, engine_of, make, one_by_one, request

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=7)
"""Of three ids: many begin alike."""


def jobs_of(prompts: list[list[int]], cached: list[list[int]]) -> list[Job]:
    jobs = []
    for number, prompt in enumerate(prompts):
        ids = np.array(cached[number] if number < len(cached) else [], np.int32)
        asked = Request(str(number), np.array(prompt, np.int32), Sampling(4), number)
        jobs.append(Job(asked, 4, Session(str(number), ids=ids)))
    return jobs


def fewest_tokens(jobs: list[Job], known: dict[str, int]) -> int:
    """By trying every choice of those who are computed first; the others take over from the last of them."""
    distinct = sorted(jobs, key=lambda job: job.prompt.tolist())
    best = 10**9
    others = range(1, len(distinct))
    for first in (set(chosen) for size in range(len(distinct)) for chosen in combinations(others, size)):
        total, source = 0, distinct[0]
        for number, job in enumerate(distinct):
            spared = known[job.request.session]
            if number in first or number == 0:
                source = job
            else:
                spared = max(spared, common_length(source.prompt, job.prompt))
            total += len(job.prompt) - spared
        best = min(best, total)
    return best


@given(PROMPTS, PROMPTS)
def test_every_prompt_is_computed_once_and_with_the_least_work(prompts, cached):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "_WORTH", 1)
        jobs = jobs_of(prompts, cached)
        own = {
            job.request.session: min(common_length(job.session.ids, job.prompt), len(job.prompt) - 1) for job in jobs
        }
        plan = plan_prefill(jobs)
    computed = [*plan.first, *(job for job, _ in plan.followers)]
    assert sorted(int(job.request.session) for job in [*computed, *(job for job, _ in plan.copies)]) == list(
        range(len(jobs))
    )
    for job, source in plan.followers:
        assert source in plan.first
        assert own[job.request.session] < job.known < len(job.prompt)
        assert job.known <= common_length(job.prompt, source.prompt)
    for job, source in plan.copies:
        assert source in computed
        assert job.prompt.tolist() == source.prompt.tolist()
    for job in jobs:
        assert len(job.session.ids) == own[job.request.session], "its own row knows no more than before"
    assert sum(len(job.prompt) - job.known for job in computed) == fewest_tokens(computed, own)


def test_what_spares_little_waits_for_nobody():
    plan = plan_prefill(jobs_of([[1, 2, 3], [1, 2, 4]], []))
    assert len(plan.first) == 2
    long = [[1] * 300 + [last] for last in (2, 3)]
    assert len(plan_prefill(jobs_of(long, [])).followers) == 1
    assert len(plan_prefill(jobs_of(long, []), share=False).first) == 2


def turns_of(attempts: int) -> list[dict[str, list[int]]]:
    """Prompts of some turns of two tasks: role, task, number of the turn, what all attempts have seen, their own."""
    rng = np.random.default_rng(3)
    role, tasks, seen = (rng.integers(3, VOCABULARY, shape).tolist() for shape in (40, (2, 9), (2, 60)))
    turns = []
    for turn in range(4):
        # The first two attempts are in the same place.
        tails = rng.integers(3, VOCABULARY, (2 * attempts, 2 + turn)).tolist()
        prompts = {
            f"{task}/{number}": role + tasks[task] + [3 + turn] + seen[task] + tails[max(1, number) + task * attempts]
            for task in range(2)
            for number in range(attempts)
        }
        turns.append(prompts)
    return turns


@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_that_begin_alike_equal_the_plain_computation(tiny_policy, kind):
    policy = make(tiny_policy, kind)
    engine = engine_of(policy)
    check_turns(policy, engine)


@pytest.mark.parametrize("settings", [{"max_batch": 5}, {"keep_cache": False}, {"cache_gib": gib(900)}], ids=str)
def test_whatever_the_settings(tiny_policy, settings):
    policy = tiny_policy()
    check_turns(policy, engine_of(policy, **settings))


def check_turns(policy, engine) -> None:
    for turn, prompts in enumerate(turns_of(attempts=5)):
        asked = [request(name, ids, seed=turn, max_new_tokens=3) for name, ids in prompts.items()]
        for one, completion in zip(asked, engine.generate(asked), strict=True):
            check(completion, one_by_one(policy, one))


def test_what_prompts_begin_with_is_fed_once(tiny_policy):
    policy = tiny_policy()
    fed = {}
    for share in (True, False):
        engine, counting = engine_of(policy, share_prompts=share), Counting(policy)
        fed[share] = []
        for prompts in turns_of(attempts=5):
            engine.generate([request(name, ids, max_new_tokens=1) for name, ids in prompts.items()])
            fed[share].append(counting.since())
    assert fed[False] == [10 * 112, *(10 * (61 + 2 + turn) for turn in (1, 2, 3))]
    # A task's first attempt whole, of the others the tail; the cache knows role and task from the second turn on.
    assert fed[True] == [2 * (110 + 4 * 2), *(2 * (61 + 4 * (2 + turn)) for turn in (1, 2, 3))]

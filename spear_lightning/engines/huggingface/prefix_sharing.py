"""Common prefixes of prompts, which are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from spear_lightning.engines.huggingface.jobs import Job
from spear_lightning.policy.packing import common_length, sorted_for_sharing

_WORTH = 256  # tokens that must be spared in all: prompts that wait for others need forward passes of their own


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The order in which prompts are computed. Every job is in one of the lists, once.

    Attributes:
        first: jobs whose prompts are computed from the prefixes in their own rows.
        followers: pairs of a job and one of ``first``. The job copies the first ``job.known`` tokens from the other's
            row; the rest is computed then.
        copies: pairs of a job and one that is computed and has the same prompt.
    """

    first: list[Job]
    followers: list[tuple[Job, Job]]
    copies: list[tuple[Job, Job]]


def plan_prefill(jobs: Sequence[Job], share: bool = True) -> PrefillPlan:
    """Find the cached prefix of each prompt, and cut the sessions back to it.

    Args:
        jobs: with their sessions.
        share: compute common prefixes once.
    """
    same: dict[bytes, list[Job]] = {}
    for job in jobs:
        session = job.session
        # The last token is always fed: its logits are what generation starts from.
        job.known = min(common_length(session.ids, job.prompt), len(job.prompt) - 1)
        session.ids = session.ids[: job.known]
        same.setdefault(job.prompt.tobytes(), []).append(job)
    if not share:
        return PrefillPlan(list(jobs), [], [])
    leaders, copies = [], []
    for alike in same.values():
        leader = max(alike, key=lambda job: job.known)
        leaders.append(leader)
        copies += [(job, leader) for job in alike if job is not leader]
    distinct = [leaders[number] for number in sorted_for_sharing([job.prompt for job in leaders])]
    common = np.array([0, *(common_length(one.prompt, other.prompt) for one, other in pairwise(distinct))])
    first, followers = [], []
    for job, source, shared in zip(distinct, *_sources(distinct, common), strict=True):
        if shared > job.known:
            job.known = shared
            followers.append((job, distinct[source]))
        else:
            first.append(job)
    return PrefillPlan(first, followers, copies)


def _sources(jobs: Sequence[Job], common: np.ndarray) -> tuple[list[int], list[int]]:
    """The job that each job copies a prefix from, and the prefix's tokens; 0 where copying does not pay.

    The common prefix of two prompts, in order, is the shortest common prefix of the neighbours between them: so the
    latest source is the best, and the jobs fall into runs that begin with their source. Dynamic programming finds the
    runs that leave the fewest tokens to compute.

    Args:
        jobs: with distinct prompts, in the order of their ids.
        common: tokens that each prompt has in common with the one before it, ``(jobs,)``.
    """
    count = len(jobs)
    known = np.array([job.known for job in jobs])
    new = np.array([len(job.prompt) for job in jobs]) - known
    fewest = np.full(count + 1, np.iinfo(np.int64).max)  # tokens to be computed for all jobs before a place
    fewest[0] = 0
    begins = np.zeros(count + 1, np.int64)  # where the last run before a place begins
    for start in range(count):
        spared = np.maximum(np.minimum.accumulate(common[start + 1 :]) - known[start + 1 :], 0)
        tokens = fewest[start] + new[start] + np.concatenate([[0], np.cumsum(new[start + 1 :] - spared)])
        better = tokens < fewest[start + 1 :]
        fewest[start + 1 :][better] = tokens[better]
        begins[start + 1 :][better] = start
    sources, shared = list(range(count)), [0] * count
    end = count if new.sum() - fewest[count] >= _WORTH else 0
    while end:
        start = int(begins[end])
        sources[start + 1 : end] = [start] * (end - start - 1)
        shared[start + 1 : end] = np.minimum.accumulate(common[start + 1 : end]).tolist()
        end = start
    return sources, shared

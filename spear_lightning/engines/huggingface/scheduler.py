"""Continuous batching: requests join while others are being answered, and leave when they are done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from spear_lightning.engines.base import Completion, CompletionStream, Request
from spear_lightning.engines.batches import check_requests
from spear_lightning.engines.huggingface.cache_rows import SessionRows
from spear_lightning.engines.huggingface.forward import CachedForward, generation_mode
from spear_lightning.engines.huggingface.jobs import Job
from spear_lightning.engines.huggingface.kv_cache import KeyValueRows
from spear_lightning.engines.huggingface.prefix_sharing import PrefillPlan, plan_prefill
from spear_lightning.engines.huggingface.sampling import TokenSampler

_POLL_STEPS = 4  # tokens between two looks at what the environments have answered
_JOIN_SHARE = 4  # a prefill pays when one request joins for so many that decode …
_JOIN_STEPS = 8  # … or when they have waited for so many tokens


class HuggingFaceStream(CompletionStream):
    """Requests that are being answered together.

    Rows that decode are neighbours, so that their keys and values are a view; when half of them are done, or others
    join, the rest moves together.

    Args:
        model: to compute with.
        rows: of its cache.
        max_length: longest sequence in tokens.
        max_batch: most requests that decode together.
        keep: keep the sessions of requests that are done.
        share: compute common prefixes of prompts that join together once.
    """

    def __init__(
        self, model: CachedForward, rows: SessionRows, max_length: int, max_batch: int, keep: bool, share: bool
    ) -> None:
        self._model, self._rows = model, rows
        self._max_length, self._max_batch, self._keep, self._share = max_length, max_batch, keep, share
        self._sessions: set[str] = set()
        self._completed: dict[str, Completion] = {}
        self._waiting: deque[Job] = deque()
        self._waited = 0
        self._active: list[Job] = []  # neighbours from row _first on; some may be done, never all
        self._first = 0
        self._logits: Tensor | None = None
        self._sampler: TokenSampler | None = None

    @property
    @override
    def unfinished(self) -> int:
        return len(self._sessions)

    @override
    def submit(self, requests: Sequence[Request]) -> None:
        if doubled := self._sessions.intersection(request.session for request in requests):
            raise ValueError(f"session {min(doubled)} has a request that is not answered yet")
        self._model.check_weights()
        check_requests(requests, self._model.policy.causal_lm.get_input_embeddings().num_embeddings)
        jobs = [
            Job(request, min(request.sampling.max_new_tokens, self._max_length - len(request.prompt_ids)))
            for request in requests
        ]
        capacity = self._rows.cache.capacity
        for job in jobs:
            if capacity is not None and job.limit > 0 and job.columns > capacity:
                raise ValueError(
                    f"session {job.request.session}: a prompt of {len(job.prompt)} tokens and up to {job.limit} new "
                    f"ones do not fit into a cache of {capacity} tokens: raise engine.cache_gib, or limit prompts and "
                    "responses (engine.max_length, data.max_response_tokens)"
                )
        self._sessions.update(request.session for request in requests)
        self._completed |= {job.request.session: job.completion(self._model.version) for job in jobs if job.done}
        self._waiting.extend(job for job in jobs if not job.done)

    @override
    def poll(self) -> dict[str, Completion]:
        return self._advance(_POLL_STEPS)

    @override
    def finish(self) -> dict[str, Completion]:
        return self._advance(math.inf)

    @override
    def close(self) -> None:
        self._waiting.clear()
        self._sessions.clear()
        self._active, self._logits, self._sampler = [], None, None

    def _advance(self, steps: float) -> dict[str, Completion]:
        """Draw up to ``steps`` tokens for each request; the finished completions by session."""
        completed, self._completed = self._completed, {}
        if self._waiting or self._active:
            self._model.check_weights()
            try:
                with generation_mode(self._model.policy):
                    while (self._waiting or self._active) and steps > 0:
                        for job in self._step():
                            completed[job.request.session] = job.completion(self._model.version)
                        steps -= 1
            except BaseException:
                self.close()
                raise
        self._sessions.difference_update(completed)
        return completed

    def _step(self) -> list[Job]:
        """Draw one token for each request; the requests that this finishes."""
        if self._waiting:
            self._join_waiting()
        assert self._logits is not None
        assert self._sampler is not None
        device = self._model.device
        steps = torch.tensor([len(job.tokens) for job in self._active], device=device)
        draw = self._sampler.draw(self._logits, steps)
        # One transfer; float64 holds token ids and float32 numbers exactly.
        drawn = torch.stack([part.double() for part in draw]).tolist()
        finished = []
        for job, token, logp, entropy in zip(self._active, *drawn, strict=True):
            if job.done:
                continue
            job.append(int(token), logp, entropy)
            if job.done:
                finished.append(job)
                if self._keep:  # the last token was not fed
                    job.session.ids = np.concatenate([job.prompt, np.array(job.tokens[:-1], np.int32)])
                else:
                    self._rows.end(job.session.name)
        going = sum(not job.done for job in self._active)
        tokens = draw.tokens
        if not going:
            self._active, self._logits, self._sampler = [], None, None
            return finished
        if 2 * going <= len(self._active):
            tokens = self._gather(tokens)
        columns = max(job.length for job in self._active)
        if not self._rows.fits(columns):
            tokens = self._gather(tokens)
            columns = max(job.length for job in self._active)
            # Some tokens ahead, so that it does not come to this at every one.
            ahead = min(columns + 64, max(job.columns for job in self._active))
            self._first = self._rows.evict(self._block(), ahead).start
        self._rows.reserve(columns)
        self._logits = self._model.decode(self._rows.cache, self._active, self._first, tokens)
        return finished

    def _join_waiting(self) -> None:
        """Prefill waiting requests, if there is room and enough of them, and add them to those that decode."""
        going = sum(not job.done for job in self._active)
        self._waited += 1
        joining = self._joinable(going)
        if not joining or (going and _JOIN_SHARE * len(joining) < going and self._waited < _JOIN_STEPS):
            return
        self._waited = 0
        for _ in joining:
            self._waiting.popleft()
        if self._logits is not None:
            self._logits = self._gather(self._logits)
        self._rows.tick()
        for job in (*self._active, *joining):
            job.session = self._rows.session(job.request.session)
        plan = plan_prefill(joining, self._share)
        columns = max([*(len(job.prompt) + 1 for job in joining), *(job.length for job in self._active)])
        block = self._rows.allocate([job.session for job in joining], self._block(), columns)
        self._first = block.start
        self._rows.reserve(columns)
        joining.sort(key=lambda job: job.session.row)
        logits = self._prefill(joining, plan)
        sampler = TokenSampler([job.request for job in joining], [job.limit for job in joining], self._model.device)
        if self._sampler is None or self._logits is None:
            self._logits, self._sampler = logits, sampler
        else:
            self._logits = torch.cat([self._logits, logits])
            self._sampler.join(sampler)
        self._active += joining

    def _prefill(self, joining: Sequence[Job], plan: PrefillPlan) -> Tensor:
        """Compute the prompts of those that join; the logits after each."""
        cache = self._rows.cache
        computed = sorted(plan.first, key=lambda job: job.session.row)
        logits = self._model.prefill(cache, computed)
        if plan.followers:
            _copy(cache, plan.followers, max(follower.known for follower, _ in plan.followers))
            followers = sorted((follower for follower, _ in plan.followers), key=lambda job: job.session.row)
            logits = torch.cat([logits, self._model.prefill(cache, followers)])
            computed += followers
        _copy(cache, plan.copies, max((len(job.prompt) for job, _ in plan.copies), default=0))
        lines = {id(job): line for line, job in enumerate(computed)}
        lines |= {id(job): lines[id(source)] for job, source in plan.copies}
        order = [lines[id(job)] for job in joining]
        return logits if order == list(range(len(logits))) else logits[order]

    def _joinable(self, going: int) -> list[Job]:
        """Those that can join now: within the batch, and within the cache if all grow to their limits."""
        capacity = self._rows.cache.capacity
        columns = max((job.columns for job in self._active if not job.done), default=0)
        joining: list[Job] = []
        for job in self._waiting:
            columns = max(columns, job.columns)
            count = going + len(joining) + 1
            if count > self._max_batch or (capacity is not None and count * columns > capacity):
                break
            joining.append(job)
        return joining

    def _block(self) -> range:
        return range(self._first, self._first + len(self._active))

    def _gather(self, lines: Tensor) -> Tensor:
        """Compact the rows that still decode; their lines of a tensor, in the new order."""
        assert self._sampler is not None
        jobs = self._active
        going = sum(not job.done for job in jobs)
        if going == len(jobs):
            return lines
        holes = [number for number in range(going) if jobs[number].done]
        movers = [number for number in range(going, len(jobs)) if not jobs[number].done]
        width = max(job.length for job in jobs)
        self._rows.exchange([self._first + hole for hole in holes], [self._first + mover for mover in movers], width)
        kept = list(range(going))
        for hole, mover in zip(holes, movers, strict=True):
            kept[hole] = mover
        self._active = [jobs[number] for number in kept]
        chosen = torch.tensor(kept, device=lines.device)
        self._sampler.select(chosen)
        return lines[chosen]


def _copy(cache: KeyValueRows, pairs: Sequence[tuple[Job, Job]], width: int) -> None:
    """For each pair, copy the first columns of the second job's row to that of the first."""
    cache.copy([job.session.row for _, job in pairs], [job.session.row for job, _ in pairs], width)

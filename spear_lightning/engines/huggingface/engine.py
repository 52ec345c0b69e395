"""Rollouts in the training process, on the very weights that are trained.

What makes it fast on small models and exact on all:

- Keys and values are kept from turn to turn of an episode; only what is new in a prompt is fed. Each episode has a row
  of the cache and every row its own length (:mod:`spear_lightning.engines.huggingface.kv_cache`).
- Episodes that ask for the same prompt (a group that starts, or attempts that are still alike) have it computed once.
- Prompts of very different length are fed in groups of similar length.
- Rows that decode are neighbours, so their keys and values are a view; when half of them are done, the others move
  together. Requests join while others are being answered (:mod:`spear_lightning.engines.huggingface.scheduler`).
- A cache of limited size keeps the sessions that were used last
  (:mod:`spear_lightning.engines.huggingface.cache_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from spear_lightning.engines.base import Completion, CompletionStream, Request, RolloutEngine
from spear_lightning.engines.batches import check_requests
from spear_lightning.engines.huggingface.cache_rows import SessionRows
from spear_lightning.engines.huggingface.forward import CachedForward, generation_mode
from spear_lightning.engines.huggingface.jobs import Job
from spear_lightning.engines.huggingface.memory import free_bytes
from spear_lightning.engines.huggingface.scheduler import Generation
from spear_lightning.policy.policy import Policy

_POLL_STEPS = 4  # tokens between two looks at what the environments have answered


class HuggingFaceEngine(RolloutEngine):
    """Generates with the policy's own Hugging Face model, in the training process.

    Behaviour log-probabilities equal :meth:`~spear_lightning.policy.policy.Policy.evaluate` to rounding, so no
    correction is needed. What is drawn for a request depends on its prompt, sampling and seed, not on the batch.

    The engine holds a reference to the policy, not a copy: after every change of the weights :meth:`sync` must be
    called, and generating without is refused. For ZeRO-3, whose weights are partitioned, give it a gathered replica.

    Args:
        keep_cache: keep keys and values between the turns of an episode: much faster, at the price of the memory for
            all episodes that are being played. Without, every prompt is computed anew.
        max_batch: requests decoded together; others wait and join when there is room.
        max_length: longest sequence, prompt and response; by default what the model allows.
        cache_gib: memory for keys and values in GiB, allocated at once. When it is full, the episodes that have waited
            longest lose theirs, which are computed again when they go on: slower, with the same result. ``None`` takes
            what the episodes need.
        share_prompts: compute once what the prompts of several requests begin with.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        keep_cache: bool = True,
        max_batch: int = 256,
        max_length: int | None = None,
        cache_gib: float | None = None,
        share_prompts: bool = True,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"engine.max_batch must be at least 1, not {max_batch}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"engine.max_length must be at least 2 (a prompt and a token), not {max_length}")
        if cache_gib is not None and not cache_gib > 0:
            raise ValueError(f"engine.cache_gib must be above 0, or null for no limit, not {cache_gib}")
        self.keep_cache = keep_cache
        self.max_batch = max_batch
        self.max_length = max_length
        self.cache_gib = cache_gib
        self.share_prompts = share_prompts
        self._model: CachedForward | None = None
        self._version = 0
        self._weights: tuple[nn.Parameter, ...] = ()
        self._weights_state = 0
        self._capacity: int | None = None
        self._token_bytes = 0
        self._drop_caches()

    @property
    def evicted(self) -> int:
        """Number of sessions that had to leave a full cache since the last :meth:`sync` or :meth:`sleep`."""
        return self._rows.evicted

    # --- the protocol --------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, device: torch.device) -> None:
        """Refuse a cache that is larger than what is free on ``device``.

        Raises:
            ValueError: it is.
        """
        self._check_memory(device)

    def sync(self, policy: Policy, version: int) -> None:
        """Generate with ``policy`` as it is now; every cache made with other weights is dropped.

        Args:
            policy: that is trained; referred to, not copied.
            version: of its weights, handed on with every completion.

        Raises:
            ValueError: the model's architecture keeps no ordinary keys and values (recurrent models, ALiBi), or
                ``cache_gib`` is more than the device has free.
        """
        if self._model is None or policy is not self._model.policy:
            self._drop_caches()
            self._model = CachedForward(policy)
            if self.cache_gib is not None:
                self._check_memory(self._model.device)
                with generation_mode(policy):
                    self._token_bytes = self._model.token_bytes()
                self._capacity = int(self.cache_gib * 2**30) // self._token_bytes
        else:
            self._model.refresh()
        self._version = version
        self._weights = tuple(policy.parameters())
        self._weights_state = self._state_of_weights()
        self._drop_caches()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Args:
            requests: with distinct sessions. A prompt that leaves no room for a token gets an empty completion that
                finishes by ``"length"``.

        Raises:
            RuntimeError: before the first :meth:`sync`, or when the weights have changed since.
            ValueError: a request is malformed (empty prompt, unknown token id, doubled session, sampling out of range),
                or cannot fit into the cache even alone.
        """
        stream = self.stream()
        stream.submit(requests)
        completions = stream.finish()
        return [completions[request.session] for request in requests]

    def stream(self) -> HuggingFaceStream:
        """Requests that may join while others are being answered.

        Raises:
            RuntimeError: before the first :meth:`sync`.
        """
        if self._model is None:
            raise RuntimeError("HuggingFaceEngine.generate was called before sync: it has no policy yet")
        generation = Generation(self._model, self._rows, self.max_batch, self.keep_cache, self.share_prompts)
        return HuggingFaceStream(self, self._model.policy, generation)

    def end(self, session: str) -> None:
        """Free the session's row."""
        self._rows.end(session)

    def sleep(self) -> None:
        """Free all caches."""
        self._drop_caches()

    def wake(self) -> None:
        """Nothing to be made ready."""

    def close(self) -> None:
        """Free all caches and let go of the policy."""
        self._drop_caches()
        self._model, self._weights = None, ()

    # --- for its streams -----------------------------------------------------------------------------------------

    def admit(self, requests: Sequence[Request]) -> tuple[list[Job], dict[str, Completion]]:
        """What there is to do for requests, and completions of those whose prompts leave no room for a token.

        Raises:
            RuntimeError: the weights have changed since the last :meth:`sync`.
            ValueError: see :meth:`generate`.
        """
        assert self._model is not None
        self.check_weights()
        policy, longest = self._model.policy, self._longest()
        check_requests(requests, policy.causal_lm.get_input_embeddings().num_embeddings)
        jobs, completions = [], {}
        for request in requests:
            limit = min(request.sampling.max_new_tokens, longest - len(request.prompt_ids))
            job = Job(request, max(0, limit))
            if limit > 0:
                self._check_room(job)
                jobs.append(job)
            else:
                completions[request.session] = job.completion(self._version)
        return jobs, completions

    def completion(self, job: Job) -> Completion:
        """What came of a job."""
        return job.completion(self._version)

    def check_weights(self) -> None:
        """Refuse to go on with weights that have changed.

        Raises:
            RuntimeError: they have since the last :meth:`sync`.
        """
        if self._state_of_weights() != self._weights_state:
            raise RuntimeError(
                "the policy's weights have changed since HuggingFaceEngine.sync: call it after every update"
            )

    # --- limits and state ----------------------------------------------------------------------------------------

    def _check_memory(self, device: torch.device) -> None:
        if self.cache_gib is None or (free := free_bytes(device)) is None:
            return
        if self.cache_gib * 2**30 > free:
            raise ValueError(
                f"data.engine.cache_gib is {self.cache_gib:g}, but only {free / 2**30:.3g} GiB are free on {device}: "
                "lower it (a full cache costs time, not exactness), or free memory there"
            )

    def _check_room(self, job: Job) -> None:
        if self._capacity is not None and job.columns > self._capacity:
            needed = job.columns * self._token_bytes / 2**30
            raise ValueError(
                f"session {job.request.session}: a prompt of {len(job.prompt)} tokens and up to {job.limit} new ones "
                f"need {needed:.3g} GiB of keys and values, and engine.cache_gib is {self.cache_gib:g}: raise it, or "
                "limit prompts and responses (engine.max_length, data.max_response_tokens)"
            )

    def _longest(self) -> int:
        assert self._model is not None
        positions = getattr(self._model.policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (self.max_length, positions) if limit]
        return min(limits, default=2**31)

    def _drop_caches(self) -> None:
        self._rows = SessionRows(self._capacity)

    def _state_of_weights(self) -> int:
        """A number that changes when a weight is written to (PyTorch counts writes)."""
        return sum(weight._version for weight in self._weights)


class HuggingFaceStream(CompletionStream):
    """Requests to a :class:`HuggingFaceEngine` that come one after the other; made by its ``stream`` method."""

    def __init__(self, engine: HuggingFaceEngine, policy: Policy, generation: Generation) -> None:
        self._engine, self._policy, self._generation = engine, policy, generation
        self._sessions: set[str] = set()
        self._completed: dict[str, Completion] = {}

    @property
    def unfinished(self) -> int:
        """Number of requests whose completion has not been given out."""
        return len(self._sessions)

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests join those that are being answered."""
        if doubled := self._sessions.intersection(request.session for request in requests):
            raise ValueError(f"session {min(doubled)} has a request that is not answered yet")
        jobs, completions = self._engine.admit(requests)
        self._sessions.update(request.session for request in requests)
        self._completed |= completions
        self._generation.submit(jobs)

    def poll(self) -> dict[str, Completion]:
        """Draw a few tokens; the completions that are finished, by session."""
        return self._advance(_POLL_STEPS)

    def finish(self) -> dict[str, Completion]:
        """All outstanding completions."""
        return self._advance(None)

    def close(self) -> None:
        """Answer nothing more."""
        self._generation.abandon()
        self._sessions.clear()

    def _advance(self, steps: int | None) -> dict[str, Completion]:
        completed, self._completed = self._completed, {}
        if self._generation.unfinished:
            self._engine.check_weights()
            try:
                with generation_mode(self._policy):
                    while self._generation.unfinished and steps != 0:
                        for job in self._generation.step():
                            completed[job.request.session] = self._engine.completion(job)
                        steps = None if steps is None else steps - 1
            except BaseException:
                self.close()
                raise
        self._sessions.difference_update(completed)
        return completed

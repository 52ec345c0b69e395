"""Rollouts in the training process, on the very weights that are trained.

What makes it fast on small models and exact on all:

- Keys and values are kept from turn to turn of an episode; only what is new in a prompt is fed. Each episode has a row
  of the cache and every row its own length (:mod:`spear_lightning.engines.huggingface.kv_cache`).
- Common prefixes of prompts (a group that starts, or attempts that are still alike) are computed once.
- Prompts of very different length are fed in groups of similar length.
- Rows that decode are neighbours, so their keys and values are a view; when half of them are done, the others move
  together. Requests join while others are being answered (:mod:`spear_lightning.engines.huggingface.scheduler`).
- A full cache evicts the least recently used sessions
  (:mod:`spear_lightning.engines.huggingface.cache_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from typing_extensions import override

from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.engines.huggingface.cache_rows import SessionRows
from spear_lightning.engines.huggingface.forward import CachedForward, generation_mode
from spear_lightning.engines.huggingface.memory import free_bytes
from spear_lightning.engines.huggingface.scheduler import HuggingFaceStream
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.ranges import Above0, Positive, in_range


@in_range
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
        max_length: longest sequence, prompt and response, at least 2; by default what the model allows.
        cache_gib: memory for keys and values in GiB, allocated at once. When it is full, the least recently used
            episodes lose theirs, which are computed again when they go on: slower, with the same result. ``None``
            takes what the episodes need.
        share_prompts: compute common prefixes of several requests' prompts once.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        keep_cache: bool = True,
        max_batch: Positive = 256,
        max_length: Annotated[int, Ge(2)] | None = None,
        cache_gib: Above0 | None = None,
        share_prompts: bool = True,
    ) -> None:
        self.keep_cache, self.max_batch, self.max_length = keep_cache, max_batch, max_length
        self.cache_gib, self.share_prompts = cache_gib, share_prompts
        self._model: CachedForward | None = None
        self._capacity: int | None = None
        self._rows = SessionRows()

    @property
    def evicted(self) -> int:
        """Number of sessions evicted from a full cache since the last :meth:`sync` or :meth:`sleep`."""
        return self._rows.evicted

    @override
    def prepare(self, policy: Policy, device: torch.device) -> None:
        """Refuse a cache that is larger than the free memory of ``device``.

        Raises:
            ValueError: it is.
        """
        free = free_bytes(device)
        if self.cache_gib is not None and free is not None and self.cache_gib * 2**30 > free:
            raise ValueError(
                f"data.engine.cache_gib is {self.cache_gib:g}, but only {free / 2**30:.3g} GiB are free on {device}: "
                "lower it (a full cache costs time, not exactness), or free memory there"
            )

    @override
    def sync(self, policy: Policy, version: int) -> None:
        """See the base class; ``policy`` is referred to, not copied.

        Raises:
            ValueError: the model's architecture keeps no ordinary keys and values (recurrent models, ALiBi), or
                ``cache_gib`` is more than the device has free.
        """
        if self._model is None or policy is not self._model.policy:
            self.sleep()
            self._model = CachedForward(policy)
            if self.cache_gib is not None:
                self.prepare(policy, self._model.device)
                with generation_mode(policy):
                    self._capacity = int(self.cache_gib * 2**30) // self._model.token_bytes()
        else:
            self._model.refresh()
        self._model.version = version
        self.sleep()

    @override
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See the base class. A prompt that leaves no room for a token gets an empty completion.

        Raises:
            RuntimeError: before the first :meth:`sync`, or when the weights have changed since.
            ValueError: a request is malformed (empty prompt, unknown token id, doubled session), or cannot fit into the
                cache even alone.
        """
        stream = self.stream()
        stream.submit(requests)
        completions = stream.finish()
        return [completions[request.session] for request in requests]

    @override
    def stream(self) -> HuggingFaceStream:
        """Requests that may join while others are being answered.

        Raises:
            RuntimeError: before the first :meth:`sync`.
        """
        if self._model is None:
            raise RuntimeError("HuggingFaceEngine.generate was called before sync: it has no policy yet")
        positions = getattr(self._model.policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        longest = min((limit for limit in (self.max_length, positions) if limit), default=2**31)
        return HuggingFaceStream(self._model, self._rows, longest, self.max_batch, self.keep_cache, self.share_prompts)

    @override
    def end(self, session: str) -> None:
        self._rows.end(session)

    @override
    def sleep(self) -> None:
        self._rows = SessionRows(self._capacity)

    @override
    def close(self) -> None:
        self.sleep()
        self._model = None

"""Forward passes of a policy over the rows of a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear_lightning.engines.batches import similar_lengths
from spear_lightning.engines.huggingface.jobs import Job
from spear_lightning.engines.huggingface.kv_cache import KeyValueRows
from spear_lightning.engines.huggingface.llama import LlamaForward
from spear_lightning.engines.huggingface.masks import AttentionMasks
from spear_lightning.policy.policy import Policy

PREFILL_TOKENS = 16_384
"""Tokens of a pass over prompts at most."""


class CachedForward:
    """The policy's model, fed with the new tokens of each row.

    Args:
        policy: to compute with; referred to. Small weights may be copied (:meth:`refresh`).

    Attributes:
        version: of the weights, for completions.

    Raises:
        ValueError: the model's architecture keeps no ordinary keys and values (recurrent models, ALiBi).
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.version = 0
        self._masks = AttentionMasks(policy.causal_lm)
        self._llama = LlamaForward(policy) if LlamaForward.fits(policy) else None
        self.refresh()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._weights[0].device

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        if self._llama is not None:
            self._llama.refresh()
        self._weights = tuple(self.policy.parameters())
        self._written = self._count_writes()

    def check_weights(self) -> None:
        """Refuse to go on with weights that have changed.

        Raises:
            RuntimeError: they have since the last :meth:`refresh`.
        """
        if self._count_writes() != self._written:
            raise RuntimeError(
                "the policy's weights have changed since HuggingFaceEngine.sync: call it after every update"
            )

    def _count_writes(self) -> int:
        """PyTorch's own count of in-place changes."""
        return sum(weight._version for weight in self._weights)

    def token_bytes(self) -> int:
        """Bytes that the keys and values of a token take, found by feeding one."""
        cache = KeyValueRows()
        cache.reserve(1, 1)
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.feed(cache, zero, zero[0], slice(0, 1), zero, zero, 1)
        return sum(buffer.nbytes for buffer in cache.buffers) // cache.columns

    def prefill(self, cache: KeyValueRows, jobs: Sequence[Job]) -> Tensor:
        """Feed the new tokens of prompts, in groups of similar length; the logits after each, ``(jobs, vocabulary)``.

        Args:
            cache: with room for the prompts.
            jobs: with rows; ordered by row, so that neighbours are fed as a view.
        """
        device = self.device
        new = [len(job.prompt) - job.known for job in jobs]
        logits: Tensor | None = None
        # On a CPU few enough for its caches to hold intermediate results.
        for group in similar_lengths(new, most_tokens=2048 if device.type == "cpu" else PREFILL_TOKENS):
            chosen = [jobs[number] for number in group]
            tokens = max(new[number] for number in group)
            ids = np.zeros((len(group), tokens), np.int64)
            for line, (job, number) in enumerate(zip(chosen, group, strict=True)):
                ids[line, : new[number]] = job.prompt[job.known :]
            starts = torch.tensor([job.known for job in chosen], device=device)
            lasts = torch.tensor([new[number] - 1 for number in group], device=device)
            rows = [job.session.row for job in chosen]
            place: slice | Tensor = torch.tensor(rows, device=device)
            if rows == list(range(rows[0], rows[0] + len(rows))):
                place = slice(rows[0], rows[0] + len(rows))
            columns = starts[:, None] + torch.arange(tokens, device=device)
            # Padding is written beyond a row's length, at most into the column behind all of them; its position must
            # still be one the model knows.
            longest = max(len(job.prompt) for job in chosen)
            width = min(longest + 1, max(job.known for job in chosen) + tokens)
            positions = torch.minimum(columns, (starts + lasts)[:, None])
            columns = columns.clamp(max=longest)
            part = self.feed(cache, torch.from_numpy(ids).to(device), lasts, place, columns, positions, width)
            if logits is None:
                logits = part.new_empty(len(jobs), part.shape[-1])
            logits[group] = part
        assert logits is not None
        return logits

    def decode(self, cache: KeyValueRows, jobs: Sequence[Job], first: int, tokens: Tensor) -> Tensor:
        """Feed one token to each of the neighbouring rows from ``first`` on; the logits after it.

        Rows that are done stay in place: they are fed too, beyond the columns that they keep.
        """
        lengths = [job.length - 1 for job in jobs]
        columns = torch.tensor(lengths, device=tokens.device)[:, None]
        lasts = torch.zeros(len(jobs), dtype=torch.long, device=tokens.device)
        rows = slice(first, first + len(jobs))
        return self.feed(cache, tokens[:, None], lasts, rows, columns, columns, max(lengths) + 1)

    def feed(
        self,
        cache: KeyValueRows,
        ids: Tensor,
        lasts: Tensor,
        rows: slice | Tensor,
        columns: Tensor,
        positions: Tensor,
        width: int,
    ) -> Tensor:
        """Feed tokens to rows of the cache; the logits after each row's last token, ``(batch, vocabulary)``.

        Args:
            cache: with room for them.
            ids: of the tokens, ``(batch, tokens)``.
            lasts: index of each row's last token within ``ids``, ``(batch,)``.
            rows: of the cache (:meth:`KeyValueRows.open`).
            columns: that the tokens are written to, ``(batch, tokens)``.
            positions: of the tokens, below ``width``, ``(batch, tokens)``.
            width: number of columns to attend to.
        """
        cache.open(rows, columns, width)
        mask = self._masks(columns, width, self._weights[0].dtype)
        if self._llama is not None:
            assert isinstance(mask, Tensor)
            return self._llama(ids, lasts, positions, mask, cache)
        return self.policy.next_token_logits(
            ids,
            lasts,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )


@contextmanager
def generation_mode(policy: Policy) -> Iterator[None]:
    """Evaluation mode, no gradients, and an attention implementation that takes any mask; all as before at the end."""
    model: Any = policy.causal_lm
    implementation = model.config._attn_implementation
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        if implementation not in ("sdpa", "eager"):  # flash attention takes no masks of its callers
            model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            yield
    finally:
        if implementation not in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training

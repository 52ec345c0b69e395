"""Drawing tokens: one uniform number each, turned into a token by the inverse of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spear_lightning.engines.base import Request
from spear_lightning.randomness import uniforms


class Draw(NamedTuple):
    """One token per row; all of shape ``(rows,)``.

    Attributes:
        tokens: ids.
        logps: log-probability under the untruncated distribution, float32.
        entropies: of the untruncated distribution in nats, float32.
    """

    tokens: Tensor
    logps: Tensor
    entropies: Tensor


class TokenSampler:
    """Draws the tokens of a batch of requests, each from its own stream of random numbers.

    Args:
        requests: one per row.
        limits: most tokens to draw for each.
        device: of the logits.
    """

    def __init__(self, requests: Sequence[Request], limits: Sequence[int], device: torch.device) -> None:
        settings = [request.sampling for request in requests]
        numbers = np.zeros((len(requests), max(limits)))
        for row, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            numbers[row, :limit] = uniforms(request.seed, limit)
        self._numbers = torch.from_numpy(numbers).to(device)
        temperatures = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self._greedy = temperatures == 0
        self._temperatures = torch.where(self._greedy, 1.0, temperatures)[:, None]
        self._top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device)[:, None]
        self._top_k = torch.tensor([s.top_k for s in settings], device=device)[:, None]
        self._any_greedy = any(s.temperature == 0 for s in settings)
        self._any_truncated = any(s.top_p < 1 or s.top_k > 0 for s in settings)

    def draw(self, logits: Tensor, rows: Tensor, step: int) -> Draw:
        """Draw token number ``step`` of some rows.

        Args:
            logits: ``(rows, vocabulary)``, any precision.
            rows: numbers of the requests, ``(rows,)``.
            step: counts the tokens of a response from 0.
        """
        logp = torch.log_softmax(logits.float() / self._temperatures[rows], dim=-1)
        probabilities = logp.exp()
        # -inf · 0 of tokens that are ruled out counts as 0.
        entropies = -(probabilities * logp.clamp(min=-1e30)).sum(-1)
        weights = probabilities.double()
        if self._any_truncated:
            weights = self._truncated(weights, rows)
        # Rounding must not carry a number past the last token with weight, nor onto one without: look for the first
        # cumulative weight *above* a number that is below the total.
        cumulative = weights.cumsum(-1)
        total = cumulative[:, -1:]
        wanted = torch.minimum(self._numbers[rows, step, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
        if self._any_greedy:
            tokens = torch.where(self._greedy[rows], logp.argmax(-1), tokens)
        return Draw(tokens, logp.gather(-1, tokens[:, None]).squeeze(-1), entropies)

    def _truncated(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Only the ``top_k`` likeliest tokens, and of these the fewest that hold ``top_p`` of the probability."""
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(weights.shape[-1], device=weights.device)
        top_k = self._top_k[rows]
        ordered = ordered * ((ranks < top_k) | (top_k == 0))
        before, top_p = ordered.cumsum(-1) - ordered, self._top_p[rows]
        ordered = ordered * ((before < top_p * ordered.sum(-1, keepdim=True)) | (ranks == 0) | (top_p >= 1))
        return torch.zeros_like(weights).scatter_(-1, order, ordered)

"""Drawing tokens: one uniform number each, turned into a token by the inverse of the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spear_lightning.engines.base import Request
from spear_lightning.utils.randomness import uniforms

_ROWS = ("_numbers", "_greedy", "_temperatures", "_top_p", "_top_k")


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
        temperatures = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)[:, None]
        self._greedy = temperatures == 0
        self._temperatures = torch.where(self._greedy, 1.0, temperatures)
        self._top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device)[:, None]
        self._top_k = torch.tensor([s.top_k for s in settings], device=device)[:, None]
        self._any_greedy = any(s.temperature == 0 for s in settings)
        self._any_tempered = any(s.temperature not in (0, 1) for s in settings)
        self._any_truncated = any(s.top_p < 1 or s.top_k > 0 for s in settings)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        for name in _ROWS:
            setattr(self, name, getattr(self, name)[rows])

    def join(self, other: TokenSampler) -> None:
        """Append the rows of another sampler."""
        width = max(self._numbers.shape[1], other._numbers.shape[1])
        for one in (self, other):
            one._numbers = torch.nn.functional.pad(one._numbers, (0, width - one._numbers.shape[1]))
        for name in _ROWS:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self._any_greedy |= other._any_greedy
        self._any_tempered |= other._any_tempered
        self._any_truncated |= other._any_truncated

    def draw(self, logits: Tensor, steps: Tensor) -> Draw:
        """Draw the next token of each row.

        Args:
            logits: ``(rows, vocabulary)``, any precision.
            steps: number of tokens that have been drawn of each response, int64 ``(rows,)``. One that is over is drawn
                again, to no use.
        """
        logits = logits.float()
        logp = torch.log_softmax(logits / self._temperatures if self._any_tempered else logits, dim=-1)
        weights = logp.exp()
        # -inf · 0 of tokens that are ruled out counts as 0.
        entropies = -torch.linalg.vecdot(weights, logp.clamp(min=-1e30))
        if self._any_truncated:
            weights = self._truncated(weights.double())
        # Rounding must not carry a number past the last token with weight, nor onto one without: look for the first
        # cumulative weight *above* a number that is below the total.
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        numbers = self._numbers.gather(1, steps.clamp(max=self._numbers.shape[1] - 1)[:, None])
        wanted = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
        if self._any_greedy:
            tokens = torch.where(self._greedy.squeeze(-1), logp.argmax(-1), tokens)
        return Draw(tokens, logp.gather(-1, tokens[:, None]).squeeze(-1), entropies)

    def _truncated(self, weights: Tensor) -> Tensor:
        """Only the ``top_k`` likeliest tokens, and of these the fewest that hold ``top_p`` of the probability."""
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(weights.shape[-1], device=weights.device)
        ordered = ordered * ((ranks < self._top_k) | (self._top_k == 0))
        before, top_p = ordered.cumsum(-1) - ordered, self._top_p
        ordered = ordered * ((before < top_p * ordered.sum(-1, keepdim=True)) | (ranks == 0) | (top_p >= 1))
        return torch.zeros_like(weights).scatter_(-1, order, ordered)

"""Token log-probabilities and entropies without ever holding (tokens × vocabulary), forward or backward.

With a vocabulary of 150 000, the logits of a 4 096-token micro-batch are 2.5 GB in float32, and the plain computation
keeps several such tensors for its backward pass. Here the output head and the softmax are computed chunk by chunk and
recomputed in the backward pass; what is kept per token is two numbers.

With logits ``z = (h Wᵀ + b) / T``, probabilities ``p = softmax(z)`` and entropy ``H = -Σ p log p``::

    ∂ log p_y / ∂ z_j = 1[j = y] - p_j            ∂ H / ∂ z_j = -p_j (log p_j + H)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 512 * 1024 * 1024
"""Default bound on the memory of one chunk's temporaries."""

_TEMPORARIES = 4  # Logits, probabilities, their gradient, and one in the inputs' precision: at most so many per chunk.


def chunk_tokens(vocabulary: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many tokens to compute at once so that the temporaries stay within ``chunk_bytes`` (at least one)."""
    return max(1, chunk_bytes // (4 * _TEMPORARIES * vocabulary))


def token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of the distribution it is drawn from, for a plain output head.

    Gradients flow to ``hidden``, ``weight`` and ``bias`` through both results. The softmax is computed in float32
    (float64 for double inputs), whatever the precision of the inputs.

    Args:
        hidden: last hidden states, ``(tokens, width)``.
        weight: of the output head, ``(vocabulary, width)``.
        targets: token ids, integers ``(tokens,)``.
        bias: of the output head, ``(vocabulary,)``, if it has one.
        temperature: logits are divided by it; above 0.
        chunk_size: tokens computed at once; by default as many as fit :data:`CHUNK_BYTES`.

    Returns:
        ``(logps, entropies)`` in nats, both ``(tokens,)``, float32 (float64 for double inputs).

    Raises:
        ValueError: the temperature is not above 0.
    """
    _check_temperature(temperature)
    chunk_size = chunk_size or chunk_tokens(weight.shape[0])
    # What an autocast region would do to a linear layer has to be said: an autograd function is not looked into.
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    apply: Any = _ChunkedLogProbs.apply
    results: tuple[Tensor, Tensor] = apply(hidden, weight, bias, targets, temperature, chunk_size)
    return results


def stats_of_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The plain computation, for heads that are more than a matrix product (soft-capped or scaled logits).

    Args:
        logits: ``(tokens, vocabulary)``.
        targets: token ids, integers ``(tokens,)``.
        temperature: logits are divided by it; above 0.

    Returns:
        ``(logps, entropies)`` as in :func:`token_logprobs_and_entropy`.

    Raises:
        ValueError: the temperature is not above 0.
    """
    _check_temperature(temperature)
    logp = torch.log_softmax(logits.to(_softmax_dtype(logits.dtype)) / temperature, dim=-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def checkpointed_stats_of_logits(
    logits: Tensor, targets: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """As :func:`stats_of_logits`, with the softmax recomputed chunk by chunk in the backward pass."""
    pairs = [
        checkpoint(stats_of_logits, part, target, temperature, use_reentrant=False)
        for part, target in zip(torch.split(logits, chunk_size), torch.split(targets, chunk_size), strict=True)
    ]
    logps, entropies = zip(*pairs, strict=True)
    return torch.cat(logps), torch.cat(entropies)


class ChunkedHead(nn.Linear):
    """An output head that can also answer with token log-probabilities, without forming all logits.

    It takes the place of a model's ``nn.Linear`` head and shares its parameters, so state dicts and tied embeddings are
    as before. Being *called* as a module keeps what hooks into modules at work (ZeRO-3 gathers parameters so).
    """

    @classmethod
    def sharing(cls, head: nn.Linear) -> ChunkedHead:
        """A chunked head with the very parameters of ``head``."""
        twin = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        twin.weight, twin.bias = head.weight, head.bias
        return twin.train(head.training)

    def forward(  # type: ignore[override]
        self, input: Tensor, targets: Tensor | None = None, temperature: float = 1.0, chunk_size: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of ``input``; with ``targets``, the pair of :func:`token_logprobs_and_entropy` instead."""
        if targets is None:
            return super().forward(input)
        return token_logprobs_and_entropy(
            input, self.weight, targets, bias=self.bias, temperature=temperature, chunk_size=chunk_size
        )


class _ChunkedLogProbs(torch.autograd.Function):
    """The two derivatives stand at the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        softmax_dtype = _softmax_dtype(hidden.dtype)
        normalizers, logps, entropies = (
            torch.empty(len(hidden), dtype=softmax_dtype, device=hidden.device) for _ in range(3)
        )
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            logits = _logits(hidden[part], weight, bias, temperature)
            normalizers[part] = logits.logsumexp(-1)
            # H = -Σ p log p, not log Z - Σ p z: the difference of two large numbers loses a small entropy.
            logp = logits.sub_(normalizers[part, None])
            logps[part] = logp.gather(-1, targets[part, None]).squeeze(-1)
            entropies[part] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, entropies)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logps is None and grad_entropies is None:
            return None, None, None, None, None, None
        hidden, weight, bias, targets, normalizers, entropies = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        # Sums over many chunks are kept in the softmax's precision and rounded once.
        sum_dtype = _softmax_dtype(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias, dtype=sum_dtype) if for_bias else None
        for start in range(0, len(hidden), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            logps = _logits(hidden[part], weight, bias, ctx.temperature).sub_(normalizers[part, None])
            probabilities = logps.exp()
            if grad_entropies is None:
                grad = torch.zeros_like(normalizers[part, None])
            else:
                grad = logps.add_(entropies[part, None]).mul_(-grad_entropies[part, None])
            if grad_logps is not None:
                grad = grad - grad_logps[part, None]
            grad = probabilities.mul_(grad)
            if grad_logps is not None:
                grad.scatter_add_(-1, targets[part, None], grad_logps[part, None].to(grad.dtype))
            grad.div_(ctx.temperature)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = narrow @ weight
            if for_weight:
                grad_weight = _add_product(grad_weight, narrow.T, hidden[part], sum_dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        if for_weight and grad_weight is None:  # there is no token
            grad_weight = torch.zeros_like(weight)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + left @ right`` in ``dtype``, in place where there is a total: it is as large as the output head."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Logits over temperature in the softmax's precision; a fresh tensor that may be written to."""
    return F.linear(hidden, weight, bias).to(_softmax_dtype(hidden.dtype)).div_(temperature)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0 to compute log-probabilities, not {temperature}")

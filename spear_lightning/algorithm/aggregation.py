"""Means over tokens, and how a minibatch of token losses becomes one number (§2, aggregation).

A minibatch may be cut into micro-batches and spread over ranks in any way: the sum of :func:`aggregate_sum` over the
pieces, divided by :func:`normalizer` of the whole, is :func:`aggregate` of the whole, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

TINY = 1e-8


def at_least_single(x: Tensor) -> Tensor:
    """``x`` in single precision if it was in half; double stays double."""
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask, ``Σ x·m / (Σ m + 1e-8)``.

    Args:
        x: any shape; half precision is summed in single precision.
        mask: 0/1 (or bool), same shape.

    Returns:
        Scalar; 0 if the mask is empty.
    """
    x = at_least_single(x)
    inside = mask != 0
    return torch.where(inside, x, 0.0).sum() / (inside.sum().to(x.dtype) + TINY)


def aggregate(loss: Tensor, mask: Tensor, mode: Aggregation, max_length: int | None = None) -> Tensor:
    """One number from a whole batch of token losses (§2, aggregation).

    - ``token-mean``: mean over all tokens of the mask; long responses weigh more.
    - ``seq-mean-token-sum``: mean over sequences of the sum over tokens.
    - ``seq-mean-token-mean``: mean over sequences of the mean over tokens; a token of a long response weighs less.
    - ``seq-mean-token-sum-norm``: sum over sequences and tokens, divided by the constant ``L`` (Dr.GRPO): every token
      weighs the same whatever the length of its response.

    A sequence without a token in the mask (padding, filtered out) is not counted as a sequence.

    Args:
        loss: ``(batch, tokens)``.
        mask: 0/1, ``(batch, tokens)``.
        mode: see above.
        max_length: the constant ``L``, the longest response allowed; ``None`` takes the width of ``loss``.

    Returns:
        Scalar, equal to :func:`aggregate_sum` divided by :func:`normalizer`.

    Raises:
        ValueError: unknown ``mode``.
    """
    length = loss.shape[-1] if max_length is None else max_length
    total = aggregate_sum(loss, mask, mode)
    return total / normalizer([mask], mode, length).to(total.dtype)


def aggregate_sum(loss: Tensor, mask: Tensor, mode: Aggregation) -> Tensor:
    """What one micro-batch contributes to the aggregate of its minibatch, before the division by :func:`normalizer`.

    Args:
        loss: ``(batch, tokens)``.
        mask: 0/1, ``(batch, tokens)``.
        mode: as in :func:`aggregate`.

    Returns:
        Scalar.

    Raises:
        ValueError: unknown ``mode``.
    """
    _check(mode)
    loss = at_least_single(loss)
    inside = mask != 0
    sums = torch.where(inside, loss, 0.0).sum(-1)
    if mode == "seq-mean-token-mean":
        sums = sums * (1 / (inside.sum(-1).to(loss.dtype) + TINY))
    return sums.sum()


def normalizer(
    masks: Sequence[Tensor],
    mode: Aggregation,
    max_length: int | None = None,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda count: count,
) -> Tensor:
    """What the sum of all :func:`aggregate_sum` of a minibatch is divided by.

    Args:
        masks: the 0/1 masks of all its micro-batches on this rank, each ``(batch, tokens)``, of any widths.
        mode: as in :func:`aggregate`.
        max_length: the constant ``L``; only ``seq-mean-token-sum-norm`` needs it.
        reduce: sums a scalar over all ranks; the identity on one rank. Called exactly once, in every mode.

    Returns:
        Scalar, float64, on the device of the masks (CPU if there are none).

    Raises:
        ValueError: unknown ``mode``; ``max_length`` below 1, or not given where it is needed: micro-batches are padded
            to widths of their own, so none of them can stand for ``L``.
    """
    _check(mode)
    if mode == "seq-mean-token-sum-norm" and max_length is None:
        raise ValueError("aggregation seq-mean-token-sum-norm needs max_length: set it to the longest response allowed")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    lengths = torch.cat([(mask != 0).sum(-1).reshape(-1) for mask in masks] or [torch.zeros(0, dtype=torch.long)])
    count = reduce((lengths if mode == "token-mean" else lengths > 0).sum().double())
    if mode == "token-mean":
        return count + TINY
    return torch.full_like(count, max_length or 0) if mode.endswith("-norm") else count.clamp(min=1)


def _check(mode: str) -> None:
    if mode not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {mode!r}: use one of {', '.join(AGGREGATIONS)}")

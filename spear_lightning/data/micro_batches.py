"""Samples packed into padded tensors of bounded size, and dealt over optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from spear_lightning.data.samples import Sample
from spear_lightning.distributed.collectives import gather
from spear_lightning.policy.packing import Layout, common_length, sorted_for_sharing
from spear_lightning.utils.randomness import stream_seed

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that go through the policy together; all tensors have shape ``(samples, tokens)``, padded on the right.

    Attributes:
        input_ids: token ids, int64.
        attention_mask: 1 at tokens, 0 at padding, int64.
        response_mask: 1 at generated tokens that carry a gradient, float32.
        old_logps: behaviour log-probabilities, float32; 0 at tokens that were not generated.
        advantages: float32; 0 at tokens that were not generated.
        turns: number of the turn that generated the token, int16; -1 elsewhere.
        source: whether the samples were just played or come from the replay buffer.
        weights: factor of each token's loss (truncated importance sampling), float32; ``None`` is 1 everywhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    old_logps: Tensor
    advantages: Tensor
    turns: Tensor
    source: Literal["fresh", "replay"]
    weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding (waits for the device, if the tensors are on one)."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on ``device``."""
        names = ("input_ids", "attention_mask", "response_mask", "old_logps", "advantages", "turns")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, weights=None if self.weights is None else self.weights.to(device))


def empty_micro_batch(pad_id: int, source: Literal["fresh", "replay"] = "fresh") -> MicroBatch:
    """A micro-batch that costs next to nothing and has no gradient, for ranks that have fewer than others.

    One sample of two tokens that attend normally, so that nothing is divided by zero on the way through the model.
    """
    ids, nothing = np.full(2, pad_id, np.int32), np.zeros(2, np.float32)
    return micro_batch_of([Sample(ids, nothing > 0, nothing, nothing, np.full(2, -1, np.int16))], pad_id, source)


def as_many_as_other_ranks(
    batches: list[MicroBatch], pad_id: int, source: Literal["fresh", "replay"]
) -> list[MicroBatch]:
    """The micro-batches and as many empty ones as the rank with the most has more. Every rank must call it."""
    missing = max(gather(len(batches))) - len(batches)
    return batches + [empty_micro_batch(pad_id, source) for _ in range(missing)]


def pack(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    max_tokens: int,
    source: Literal["fresh", "replay"],
    layout: Layout = "padded",
) -> list[MicroBatch]:
    """Pack samples into micro-batches, as :func:`plan` says.

    Args:
        samples: each goes into exactly one micro-batch.
        pad_id: token id that short samples are filled up with.
        max_tokens: that the model computes for a micro-batch at most.
        source: recorded in the micro-batches.
        layout: how the policy takes samples.

    Raises:
        ValueError: ``max_tokens`` is not positive.
    """
    parts = plan(samples, max_tokens, layout)
    return [micro_batch_of([samples[number] for number in part], pad_id, source) for part in parts]


def plan(samples: Sequence[Sample], max_tokens: int, layout: Layout = "padded") -> list[list[int]]:
    """Which samples share a micro-batch: as few as the budget allows, of about equal cost.

    Samples of similar length go together; for the ``shared`` layout, samples that begin alike. A sample that alone
    exceeds the budget gets a micro-batch of its own. The result is a function of the order of the samples and of their
    lengths (for ``shared``, their ids) alone.

    Args:
        samples: each goes into exactly one micro-batch.
        max_tokens: that the model computes for a micro-batch at most: samples times padded length (``padded``), the
            samples' tokens (``packed``), or those without the beginnings that are computed once (``shared``).
        layout: how the policy takes samples.

    Returns:
        The numbers of the samples of each micro-batch, in their order there.

    Raises:
        ValueError: ``max_tokens`` is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
    order, sizes = _ORDERS[layout](samples, max_tokens)
    ends = np.cumsum(sizes, dtype=int)
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def micro_batch_of(samples: Sequence[Sample], pad_id: int, source: Literal["fresh", "replay"]) -> MicroBatch:
    """At least one sample as one micro-batch, short samples filled up with ``pad_id``."""
    shape = (len(samples), max(2, *(len(sample) for sample in samples)))
    ids, attention = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    mask, logps, advantages = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    turns, weights = np.full(shape, -1, np.int16), np.ones(shape, np.float32)
    for number, sample in enumerate(samples):
        end = len(sample)
        weights[number, :end] = 1 if sample.weights is None else sample.weights
        ids[number, :end], attention[number, :end], mask[number, :end] = sample.ids, 1, sample.mask
        logps[number, :end], advantages[number, :end] = sample.logps, sample.advantages
        turns[number, :end] = sample.turns
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(attention),
        response_mask=torch.from_numpy(mask),
        old_logps=torch.from_numpy(logps),
        advantages=torch.from_numpy(advantages),
        turns=torch.from_numpy(turns),
        source=source,
        weights=None if all(sample.weights is None for sample in samples) else torch.from_numpy(weights),
    )


def split_minibatches(keys: Sequence[Key], count: int, seed: int) -> dict[Key, int]:
    """Deal keyed samples into ``count`` minibatches of nearly equal size.

    Args:
        keys: of *all* ranks, each once; their order does not matter.
        count: number of minibatches.
        seed: of the deal; fold iteration and epoch into it.

    Returns:
        The minibatch of each key, from 0 to ``count - 1``.

    Raises:
        ValueError: ``count`` is not positive, or a key occurs twice.
    """
    if count < 1:
        raise ValueError(f"the number of minibatches must be at least 1, not {count}")
    if len(set(keys)) < len(keys):
        raise ValueError("split_minibatches needs distinct keys, but one occurs twice")
    shuffled = sorted(keys, key=lambda key: (stream_seed("minibatch", seed, repr(key)), repr(key)))
    return {key: position * count // len(shuffled) for position, key in enumerate(shuffled)}


def _padded(samples: Sequence[Sample], max_tokens: int) -> tuple[list[int], list[int]]:
    order = sorted(range(len(samples)), key=lambda number: (-len(samples[number]), number))
    lengths = [len(samples[number]) for number in order]
    alone = sum(length > max_tokens for length in lengths)
    low = max(lengths[alone:], default=1)
    return order, [1] * alone + _balanced(partial(_rectangles, lengths[alone:]), low, max_tokens)


def _packed(samples: Sequence[Sample], max_tokens: int) -> tuple[list[int], list[int]]:
    order = sorted(range(len(samples)), key=lambda number: (-len(samples[number]), number))
    lengths = [len(samples[number]) for number in order]
    return order, _balanced(partial(_chains, lengths, lengths), 1, max_tokens)


def _shared(samples: Sequence[Sample], max_tokens: int) -> tuple[list[int], list[int]]:
    order = sorted_for_sharing([sample.ids for sample in samples])
    lengths = [len(samples[number]) for number in order]
    common = [common_length(samples[one].ids, samples[other].ids) for one, other in pairwise(order)]
    own = [length - shared for length, shared in zip(lengths, [0, *common], strict=False)]
    return order, _balanced(partial(_chains, lengths, own), 1, max_tokens)


_ORDERS: dict[Layout, Callable[[Sequence[Sample], int], tuple[list[int], list[int]]]] = {
    "padded": _padded,
    "packed": _packed,
    "shared": _shared,
}
"""For each layout: the order of the samples, and how many of them each micro-batch takes."""


def _balanced(cut: Callable[[int], list[int]], low: int, max_tokens: int) -> list[int]:
    """The fewest pieces within the budget, with the smallest possible largest piece.

    Args:
        cut: sizes of consecutive pieces within a budget, each as large as it allows.
        low: smallest budget that can be cut to.
        max_tokens: the budget.
    """
    fewest = len(cut(max_tokens))
    high = max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return cut(high)


def _rectangles(lengths: list[int], budget: int) -> list[int]:
    """Pieces of descending lengths, each costing its samples times its longest; no length may exceed the budget."""
    sizes: list[int] = []
    start = 0
    while start < len(lengths):
        sizes.append(min(budget // max(1, lengths[start]), len(lengths) - start))  # the first of a piece is the longest
        start += sizes[-1]
    return sizes


def _chains(first: list[int], further: list[int], budget: int) -> list[int]:
    """Pieces of at least a sample; one costs ``first`` at the head of a piece and ``further`` after another."""
    sizes: list[int] = []
    room = -1
    for head, more in zip(first, further, strict=True):
        if more <= room:
            sizes[-1] += 1
            room -= more
        else:
            sizes.append(1)
            room = budget - head
    return sizes

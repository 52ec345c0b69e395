"""From rows to the minibatches of an iteration: which rows share an optimizer step, and how a step is cut to fit.

The cut must not show: a row's minibatch depends on its key alone, losses are normalised by counts over the whole global
minibatch, and every rank gets the same number of micro-batches (short ranks are padded with empty ones, because
DeepSpeed's collectives need every rank to take part in every backward pass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import torch

from spear_lightning.distributed import concatenate, gather, total
from spear_lightning.packing import Layout
from spear_lightning.randomness import stream_seed
from spear_lightning.rollout.batching import MicroBatch, empty_micro_batch, pack, split_minibatches
from spear_lightning.rollout.episode import Row

T = TypeVar("T")
Source = Literal["fresh", "replay"]


@dataclass(frozen=True, slots=True)
class Part:
    """The fresh or the replayed share of a minibatch, on this rank.

    Attributes:
        micro_batches: the same number on every rank.
        tokens: generated tokens in the loss, over all ranks.
        signal: such tokens whose advantage is not zero, over all ranks.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    tokens: int = 0
    signal: int = 0

    def to(self, device: torch.device | str) -> Part:
        """The same on another device."""
        return replace(self, micro_batches=[batch.to(device) for batch in self.micro_batches])


class Minibatch:
    """What one optimizer step learns from.

    Not a dataclass: Lightning's precision plugins look into those and would round the behaviour log-probabilities.

    Attributes:
        fresh: rows of this iteration's episodes.
        replay: rows drawn from the replay buffer.
        temperature: that the rows were sampled at; ratios are taken at the same one.
        seed: of the random choices of this step (Clip-Cov), the same on every rank.
    """

    __slots__ = ("fresh", "replay", "seed", "temperature")

    def __init__(self, fresh: Part, replay: Part, temperature: float, seed: int) -> None:
        self.fresh, self.replay, self.temperature, self.seed = fresh, replay, temperature, seed

    def to(self, device: torch.device | str) -> Minibatch:
        """The same on another device; Lightning calls it."""
        return Minibatch(self.fresh.to(device), self.replay.to(device), self.temperature, self.seed)


class IterationStream(Generic[T]):
    """A sized stream: each pass over the training stream is one SPEAR iteration.

    The length matters. Without one Lightning fetches a batch ahead, and the next rollout would be played *before* the
    update that it should follow.

    Args:
        play: a generator function that yields ``length`` items; it starts when the first one is asked for.
        length: items per pass (for training: optimizer steps per iteration).
    """

    def __init__(self, play: Callable[[], Iterator[T]], length: int) -> None:
        self._play = play
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return self._play()


def build_minibatches(
    fresh: Mapping[str, Row],
    replay: Mapping[str, Row],
    *,
    minibatches: int,
    epochs: int,
    max_tokens: int,
    pad_id: int,
    temperature: float,
    seed: int,
    iteration: int,
    layout: Layout = "padded",
) -> list[Minibatch]:
    """Deal rows into the ``epochs * minibatches`` steps of an iteration. Every rank must call it.

    Args:
        fresh: this rank's rows by a key that is unique over ranks.
        replay: likewise; replayed rows are spread over the steps like fresh ones, so that each step sees both.
        minibatches: optimizer steps per pass over the rows.
        epochs: passes over the rows.
        max_tokens: that are computed for a micro-batch at most (:func:`~spear_lightning.rollout.batching.pack`).
        pad_id: token id that short rows are filled up with.
        temperature: rows were sampled at.
        seed: of the run.
        iteration: number of this iteration.
        layout: how the policy takes rows.
    """
    steps: list[Minibatch] = []
    for epoch in range(epochs):
        parts = {}
        sources: tuple[tuple[Source, Mapping[str, Row]], ...] = (("fresh", fresh), ("replay", replay))
        for source, rows in sources:
            keys = concatenate(sorted(rows))
            step_of = split_minibatches(keys, minibatches, stream_seed("deal", source, seed, iteration, epoch))
            parts[source] = [
                _part([rows[key] for key in sorted(rows) if step_of[key] == step], max_tokens, pad_id, source, layout)
                for step in range(minibatches)
            ]
        for step in range(minibatches):
            number = epoch * minibatches + step
            steps.append(
                Minibatch(
                    fresh=parts["fresh"][step],
                    replay=parts["replay"][step],
                    temperature=temperature,
                    seed=stream_seed("update", seed, iteration, number),
                )
            )
    return steps


def _part(rows: list[Row], max_tokens: int, pad_id: int, source: Source, layout: Layout) -> Part:
    rows = [row for row in rows if row.mask.any()]  # a row without loss would only cost time
    packed = pack(rows, pad_id=pad_id, max_tokens=max_tokens, source=source, layout=layout)
    packed += [empty_micro_batch(pad_id, source=source) for _ in range(max(gather(len(packed))) - len(packed))]
    counts = total(
        {
            "tokens": sum(int(row.mask.sum()) for row in rows),
            "signal": sum(int((row.mask & (row.advantages != 0)).sum()) for row in rows),
        }
    )
    return Part(packed, int(counts["tokens"]), int(counts["signal"]))

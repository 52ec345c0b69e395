"""From rows to the minibatches of an iteration: which rows share an optimizer step, and how a step is cut to fit.

The cut must not show: a row's minibatch depends on its key alone, losses are normalised by counts over the whole global
minibatch, and every rank gets the same number of micro-batches (short ranks are padded with empty ones, because
DeepSpeed's collectives need every rank to take part in every backward pass).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch

from spear_lightning.data.micro_batches import MicroBatch, as_many_as_other_ranks, pack, split_minibatches
from spear_lightning.data.samples import Sample
from spear_lightning.distributed.collectives import concatenate, total
from spear_lightning.policy.packing import Layout
from spear_lightning.utils.randomness import stream_seed

T = TypeVar("T")
Source = Literal["fresh", "replay"]
ReplaySteps = Literal["mixed", "own"]


@dataclass(frozen=True, slots=True)
class Part:
    """The fresh or the replayed share of a minibatch, on this rank.

    Attributes:
        micro_batches: the same number on every rank.
        tokens: generated tokens in the loss, over all ranks.
        signal: such tokens whose advantage is not zero, over all ranks.
        steps: of the iteration that learn from this source; 0 if this one does not.
    """

    micro_batches: list[MicroBatch] = field(default_factory=list)
    tokens: int = 0
    signal: int = 0
    steps: int = 0

    def to(self, device: torch.device | str) -> Part:
        """The same on another device."""
        return dataclasses.replace(self, micro_batches=[batch.to(device) for batch in self.micro_batches])


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


@dataclass(frozen=True)
class StepPlan:
    """How an iteration's rows are shared out over optimizer steps.

    Args:
        minibatches: steps of a pass over the rows.
        rows: most rows of a step, over all ranks; their number then follows from how many rows there are, and
            ``minibatches`` is not looked at. ``None`` leaves it at ``minibatches``.
        epochs: passes over the rows.
        replay: replayed rows are ``mixed`` into the steps of fresh ones, or have steps of their ``own`` after them.
    """

    minibatches: int = 1
    rows: int | None = None
    epochs: int = 1
    replay: ReplaySteps = "mixed"

    def count(self, rows: int) -> int:
        """Steps of a pass over so many rows."""
        return self.minibatches if self.rows is None else max(1, -(-rows // self.rows))

    def most(self, fresh: int, replay: int) -> int:
        """Steps of an iteration of at most so many rows of each source (0: the source is not used)."""
        own = self.count(replay) if self.replay == "own" and replay else 0
        return self.epochs * (self.count(fresh) + own)


def build_minibatches(
    fresh: Mapping[str, Sample],
    replay: Mapping[str, Sample],
    *,
    plan: StepPlan,
    length: int = 0,
    max_tokens: int,
    pad_id: int,
    temperature: float,
    seed: int,
    iteration: int,
    layout: Layout = "padded",
) -> list[Minibatch]:
    """Deal rows into the steps of an iteration. Every rank must call it.

    Args:
        fresh: this rank's rows by a key that is unique over ranks.
        replay: likewise.
        plan: how they are shared out. Mixed, replayed rows are spread over the steps like fresh ones, so that each
            step sees both; in steps of their own they come after all fresh ones.
        length: minibatches to return at least; those after the last step are empty.
        max_tokens: that are computed for a micro-batch at most (:func:`~spear_lightning.data.micro_batches.pack`).
        pad_id: token id that short rows are filled up with.
        temperature: rows were sampled at.
        seed: of the run.
        iteration: number of this iteration.
        layout: how the policy takes rows.
    """

    def dealt(source: Source, rows: Mapping[str, Sample], steps: int | None = None) -> list[Part]:
        keys = concatenate(sorted(rows))
        count = plan.count(len(keys)) if steps is None else steps
        parts: list[Part] = []
        for epoch in range(plan.epochs):
            step_of = split_minibatches(keys, count, stream_seed("deal", source, seed, iteration, epoch))
            parts += [
                _part([rows[key] for key in sorted(rows) if step_of[key] == step], max_tokens, pad_id, source, layout)
                for step in range(count)
            ]
        return [dataclasses.replace(part, steps=len(parts)) for part in parts]

    new = dealt("fresh", fresh)
    if plan.replay == "mixed":
        pairs = list(zip(new, dealt("replay", replay, len(new) // plan.epochs), strict=True))
    else:
        pairs = [(part, Part()) for part in new]
        pairs += [(Part(), part) for part in (dealt("replay", replay) if concatenate(replay) else [])]
    pairs += [(Part(), Part())] * (length - len(pairs))
    return [
        Minibatch(of_fresh, of_replay, temperature, stream_seed("update", seed, iteration, number))
        for number, (of_fresh, of_replay) in enumerate(pairs)
    ]


def _part(rows: list[Sample], max_tokens: int, pad_id: int, source: Source, layout: Layout) -> Part:
    rows = [row for row in rows if row.mask.any()]  # a row without loss would only cost time
    packed = pack(rows, pad_id=pad_id, max_tokens=max_tokens, source=source, layout=layout)
    packed = as_many_as_other_ranks(packed, pad_id, source)
    counts = total(
        {
            "tokens": sum(int(row.mask.sum()) for row in rows),
            "signal": sum(int((row.mask & (row.advantages != 0)).sum()) for row in rows),
        }
    )
    return Part(packed, int(counts["tokens"]), int(counts["signal"]))

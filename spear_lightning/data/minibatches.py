"""From samples to the minibatches of an iteration: which samples share an optimizer step, and how a step is cut to fit.

The cut must not show: a sample's minibatch depends on its key alone, losses are normalised by counts over the whole
global minibatch, and every rank gets the same number of micro-batches (short ranks are padded with empty ones, because
DeepSpeed's collectives need every rank to take part in every backward pass).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


class Minibatch:
    """What one optimizer step learns from, on this rank; the numbers are over all ranks.

    Not a dataclass: Lightning's precision plugins look into those and would round the behaviour log-probabilities.

    Attributes:
        temperature: that the samples were drawn at; ratios are taken at the same one.
        seed: of the random choices of this step (Clip-Cov), the same on every rank.
        micro_batches: by source, the same number on every rank.
        tokens: generated tokens in the loss, by source.
        signal: such tokens whose advantage is not zero, by source.
        steps: of the iteration that learn from a source, if this one does; else 0.
    """

    __slots__ = ("micro_batches", "seed", "signal", "steps", "temperature", "tokens")

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature, self.seed = temperature, seed
        self.micro_batches: dict[Source, list[MicroBatch]] = {"fresh": [], "replay": []}
        self.tokens: dict[Source, int] = {"fresh": 0, "replay": 0}
        self.signal: dict[Source, int] = {"fresh": 0, "replay": 0}
        self.steps: dict[Source, int] = {"fresh": 0, "replay": 0}

    def to(self, device: torch.device | str) -> Minibatch:
        """The same on another device; Lightning calls it."""
        moved = Minibatch(self.temperature, self.seed)
        moved.tokens, moved.signal, moved.steps = self.tokens, self.signal, self.steps
        moved.micro_batches = {
            source: [b.to(device) for b in batches] for source, batches in self.micro_batches.items()
        }
        return moved


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
    """How an iteration's samples are shared out over optimizer steps.

    Args:
        minibatches: steps of a pass over the samples.
        samples: most samples of a step, over all ranks; their number then follows from how many samples there are, and
            ``minibatches`` is not looked at. ``None`` leaves it at ``minibatches``.
        epochs: passes over the samples.
        replay: replayed samples are ``mixed`` into the steps of fresh ones, or have steps of their ``own`` after them.
    """

    minibatches: int = 1
    samples: int | None = None
    epochs: int = 1
    replay: ReplaySteps = "mixed"

    def count(self, samples: int) -> int:
        """Steps of a pass over so many samples."""
        return self.minibatches if self.samples is None else max(1, -(-samples // self.samples))

    def most(self, fresh: int, replay: int) -> int:
        """Steps of an iteration of at most so many samples of each source (0: the source is not used)."""
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
    """Deal samples into the steps of an iteration. Every rank must call it.

    Args:
        fresh: this rank's samples by a key that is unique over ranks.
        replay: likewise.
        plan: how they are shared out. Mixed, replayed samples are spread over the steps like fresh ones, so that each
            step sees both; in steps of their own they come after all fresh ones.
        length: minibatches to return at least; those after the last step are empty.
        max_tokens: that are computed for a micro-batch at most (:func:`~spear_lightning.data.micro_batches.pack`).
        pad_id: token id that short samples are filled up with.
        temperature: that they were drawn at.
        seed: of the run.
        iteration: number of this iteration.
        layout: how the policy takes samples.
    """
    fresh_keys, replay_keys = concatenate(sorted(fresh)), concatenate(sorted(replay))
    new = plan.epochs * plan.count(len(fresh_keys))
    own = plan.epochs * plan.count(len(replay_keys)) if plan.replay == "own" and replay_keys else 0
    minibatches = [
        Minibatch(temperature, stream_seed("update", seed, iteration, number))
        for number in range(max(length, new + own))
    ]

    def deal(source: Source, samples: Mapping[str, Sample], keys: list[str], steps: Sequence[Minibatch]) -> None:
        count = len(steps) // plan.epochs
        step_of: dict[str, int] = {}
        for number, minibatch in enumerate(steps):
            epoch, step = divmod(number, count)
            if step == 0:
                step_of = split_minibatches(keys, count, stream_seed("deal", source, seed, iteration, epoch))
            mine = [samples[key] for key in sorted(samples) if step_of[key] == step]
            mine = [sample for sample in mine if sample.mask.any()]  # one without loss would only cost time
            packed = pack(mine, pad_id=pad_id, max_tokens=max_tokens, source=source, layout=layout)
            counts = total(
                {
                    "tokens": sum(int(sample.mask.sum()) for sample in mine),
                    "signal": sum(int((sample.mask & (sample.advantages != 0)).sum()) for sample in mine),
                }
            )
            minibatch.micro_batches[source] = as_many_as_other_ranks(packed, pad_id, source)
            minibatch.tokens[source], minibatch.signal[source] = int(counts["tokens"]), int(counts["signal"])
            minibatch.steps[source] = len(steps)

    deal("fresh", fresh, fresh_keys, minibatches[:new])
    deal("replay", replay, replay_keys, minibatches[:new] if plan.replay == "mixed" else minibatches[new : new + own])
    return minibatches

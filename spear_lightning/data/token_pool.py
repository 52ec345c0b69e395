"""Compact storage of training samples until they are replayed.

Samples repeat each other: in ``stepwise`` context each turn's prompt says most of what the one before has said, and the
episodes of a group, and those of all groups, begin alike. Samples that are stored together share a pool in which what
they repeat stands once. What is stored of a sample beside its slices of the pool is a log-probability (and a weight, if
it has any) for each generated token and four numbers a turn; everything else is made anew when it is taken out, exactly
as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spear_lightning.data.samples import Sample

_Ids = npt.NDArray[np.int32]

_GRAM = 8
"""Tokens that must agree for a repetition to be looked at: a slice costs as much as two tokens."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class TokenPool:
    """Token ids of many sequences, in which what they repeat of each other stands once.

    Args:
        tokens: of a pool that is complete; by default an empty one.

    Example:
        >>> pool = TokenPool()
        >>> first = pool.add(np.arange(100, dtype=np.int32))
        >>> again = pool.add(np.arange(20, 90, dtype=np.int32))
        >>> again.tolist(), len(pool)
        ([[20, 70]], 100)
        >>> pool.take(again)[:3].tolist()
        [20, 21, 22]
    """

    __slots__ = ("_size", "_tokens", "_where")

    def __init__(self, tokens: _Ids | None = None) -> None:
        self._tokens: _Ids = np.zeros(0, np.int32) if tokens is None else tokens
        self._size = len(self._tokens)
        self._where: dict[int, int] | None = {} if tokens is None else None

    def __len__(self) -> int:
        return self._size

    @property
    def tokens(self) -> _Ids:
        """What is in it, int32 ``(tokens,)``."""
        return self._tokens[: self._size]

    def add(self, ids: _Ids) -> npt.NDArray[np.int32]:
        """Put a sequence in.

        Args:
            ids: int32 ``(tokens,)``.

        Returns:
            Its slices of the pool, start and length, int32 ``(slices, 2)``.

        Raises:
            ValueError: the pool is complete.
        """
        if self._where is None:
            raise ValueError("the pool is complete: nothing can be added to it")
        slices: list[tuple[int, int]] = []
        hashes = _hashes(ids)
        position = unseen = 0
        while position < len(hashes):
            start = self._where.get(hashes[position])
            length = 0 if start is None else self._agreement(start, ids[position:])
            if start is None or length < _GRAM:
                position += 1
                continue
            self._append(ids[unseen:position], hashes[unseen:position], slices)
            slices.append((start, length))
            position += length
            unseen = position
        self._append(ids[unseen:], hashes[unseen:], slices)
        return np.array(slices, np.int32).reshape(-1, 2)

    def complete(self) -> None:
        """Nothing will be added any more: free what adding needs."""
        self._tokens, self._where = self.tokens.copy(), None

    def take(self, slices: npt.NDArray[np.int32]) -> _Ids:
        """The sequence that :meth:`add` has returned ``slices`` for."""
        parts = [self._tokens[start : start + length] for start, length in slices.tolist()]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _agreement(self, start: int, ids: _Ids) -> int:
        """For how many tokens the pool, from ``start`` on, goes on like ``ids``."""
        length = min(len(ids), self._size - start)
        different = (self._tokens[start : start + length] != ids[:length]).nonzero()[0]
        return int(different[0]) if len(different) else length

    def _append(self, ids: _Ids, hashes: list[int], slices: list[tuple[int, int]]) -> None:
        """Put in what was not found; ``hashes`` of the grams that begin there, some of which reach beyond it."""
        if not len(ids):
            return
        start, end = self._size, self._size + len(ids)
        if end > len(self._tokens):
            larger = np.empty(max(end, 2 * len(self._tokens)), np.int32)
            larger[:start] = self.tokens
            self._tokens = larger
        self._tokens[start:end] = ids
        self._size = end
        assert self._where is not None
        whole = len(ids) - _GRAM + 1
        self._where.update(zip(hashes[: max(0, whole)], range(start, end), strict=False))
        slices.append((start, len(ids)))


@dataclass(frozen=True, slots=True)
class StoredSample:
    """A stored training sample.

    Attributes:
        pool: that its ids are in, shared with other samples.
        slices: of the pool, int32 ``(slices, 2)``: start, length.
        logps: behaviour log-probabilities of the generated tokens, float32 ``(generated tokens,)``.
        spans: of the sample, int32 ``(spans, 4)``: tokens that were not generated, tokens generated after them, by
            which turn, and whether these carry a gradient.
        weights: of the generated tokens, float32 ``(generated tokens,)``; ``None`` if the sample has none.
    """

    pool: TokenPool
    slices: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    spans: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return int(self.spans[:, :2].sum())

    def with_advantage(self, advantage: float) -> Sample:
        """The sample as it was stored, with one advantage on all tokens that were generated."""
        lengths = self.spans[:, :2].ravel()
        spans = len(self.spans)
        of_turn = np.stack([np.full(spans, -1), self.spans[:, 2]], axis=1).ravel()
        in_loss = np.stack([np.zeros(spans), self.spans[:, 3]], axis=1).ravel()
        turns = np.repeat(of_turn, lengths).astype(np.int16)
        generated = turns >= 0
        return Sample(
            ids=self.pool.take(self.slices),
            mask=np.repeat(in_loss, lengths).astype(bool),
            logps=_spread(self.logps, generated, 0),
            advantages=np.where(generated, np.float32(advantage), np.float32(0)),
            turns=turns,
            weights=None if self.weights is None else _spread(self.weights, generated, 1),
        )


class SampleStore:
    """Puts samples away that share a pool: those of one iteration, which also leave the replay buffer together."""

    def __init__(self) -> None:
        self._pool = TokenPool()

    def add(self, sample: Sample) -> StoredSample:
        """Put a sample away; its advantages are not kept, since a replayed sample gets new ones."""
        generated = sample.turns >= 0
        weights = None if sample.weights is None else sample.weights[generated]
        return StoredSample(self._pool, self._pool.add(sample.ids), sample.logps[generated], _spans(sample), weights)

    def complete(self) -> None:
        """Nothing will be added any more."""
        self._pool.complete()


def store_samples(samples: Iterable[Sample]) -> list[StoredSample]:
    """Put samples away together, in their order."""
    store = SampleStore()
    stored = [store.add(sample) for sample in samples]
    store.complete()
    return stored


def _hashes(ids: _Ids) -> list[int]:
    """A hash of the gram that begins at each token, as far as there are whole ones."""
    count = len(ids) - _GRAM + 1
    if count < 1:
        return []
    wide = ids.astype(np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(_GRAM):
        total = (total + wide[offset : offset + count]) * _FACTOR
        total ^= total >> np.uint64(29)
    found: list[int] = total.tolist()
    return found


def _spread(values: npt.NDArray[np.float32], where: npt.NDArray[np.bool_], rest: float) -> npt.NDArray[np.float32]:
    """The values at the true places, ``rest`` at the others."""
    whole = np.full(len(where), rest, np.float32)
    whole[where] = values
    return whole


def _spans(sample: Sample) -> npt.NDArray[np.int32]:
    """Runs of equal turn and mask, each with the tokens before it that were not generated."""
    if not len(sample):
        return np.zeros((0, 4), np.int32)
    turns, mask = sample.turns.astype(np.int32), sample.mask.astype(np.int32)
    changes = np.flatnonzero((np.diff(turns) != 0) | (np.diff(mask) != 0)) + 1
    starts = np.concatenate([[0], changes])
    lengths = np.diff(np.concatenate([starts, [len(sample)]])).tolist()
    spans: list[tuple[int, int, int, int]] = []
    before = 0
    for start, length in zip(starts.tolist(), lengths, strict=True):
        if turns[start] < 0:
            before = length
            continue
        spans.append((before, length, int(turns[start]), int(mask[start])))
        before = 0
    if before:
        spans.append((before, 0, -1, 0))
    return np.array(spans, np.int32).reshape(-1, 4)

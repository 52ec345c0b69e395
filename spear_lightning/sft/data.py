"""Batches of demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from spear_lightning.sft.demonstrations import TokenRow
from spear_lightning.utils.randomness import stream_seed

Batch = dict[str, torch.Tensor]


def collate(rows: Sequence[TokenRow]) -> Batch:
    """Pad rows on the right.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``(rows, tokens)``, and ``mask`` bool ``(rows, tokens)``: the tokens
        to be learned.
    """
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    attention = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)], attention[number, : len(row)], mask[number, : len(row)] = row.ids, 1, row.mask
    return {
        name: torch.from_numpy(array)
        for name, array in (("input_ids", ids), ("attention_mask", attention), ("mask", mask))
    }


class LengthBatches(Sampler[list[int]]):
    """Batches of rows of similar length, in a new random order each epoch; equal seeds, equal batches.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows per batch.
        seed: of the shuffling.
    """

    _POOL = 8  # batches that are sorted by length together: little padding, and batches still mix all kinds of games

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng(stream_seed("warmstart", self._seed, self._epoch))
        self._epoch += 1
        order = random.permutation(len(self._lengths))
        size = self._batch_size
        batches = []
        for start in range(0, len(order), self._POOL * size):
            pool = order[start : start + self._POOL * size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
        yield from (batches[i] for i in random.permutation(len(batches)))


class WarmstartDataModule(pl.LightningDataModule):
    """Demonstrations for training, a held-out share of them for the validation loss.

    Args:
        train: rows to learn from.
        validation: rows of games that are not learned from.
        batch_size: rows per batch.
        seed: of the order of batches.
    """

    def __init__(self, train: Sequence[TokenRow], validation: Sequence[TokenRow], batch_size: int, seed: int) -> None:
        super().__init__()
        self._train, self._validation = list(train), list(validation)
        self._batch_size, self._seed = batch_size, seed

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches."""
        lengths = [len(row) for row in self._train]
        return DataLoader(
            self._train,  # type: ignore[arg-type]
            batch_sampler=LengthBatches(lengths, self._batch_size, self._seed),
            collate_fn=collate,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches in fixed order."""
        return DataLoader(self._validation, batch_size=4 * self._batch_size, collate_fn=collate)  # type: ignore[arg-type]

"""A key-value cache whose rows live as long as their episodes: each row has its own length.

Hugging Face caches append the same number of columns to every row, so rows of different length need holes and masks
that remember them. Here a row's tokens stand in columns 0, 1, 2, … without holes: the column of a token *is* its
position, cutting a row back to a common prefix is changing its length, and what stands beyond it is never looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class KeyValueRows(Cache):
    """Keys and values of many sequences, ``(rows, heads, columns, size)`` per layer, grown as needed.

    A forward pass is announced by :meth:`open`; the model's layers then call :meth:`update`.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = 0
        self._columns = 0
        self.open(slice(0, 0), torch.zeros(0, 0, dtype=torch.long), 0)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for at least so many rows and columns; contents stay."""
        if rows <= self._rows and columns <= self._columns:
            return
        old_rows, old_columns = self._rows, self._columns
        self._rows = max(rows, self._rows)
        if columns > self._columns:
            # Half as much again, so that growing token by token copies little; multiples of 64.
            self._columns = -(-max(columns, self._columns * 3 // 2) // 64) * 64
        for buffers in (self._keys, self._values):
            for layer, old in enumerate(buffers):
                # Zeros, not empty: masked columns get weight 0, and 0 times what memory may hold (NaN) is NaN.
                heads, size = old.shape[1], old.shape[3]
                new = old.new_zeros(self._rows, heads, self._columns, size)
                new[:old_rows, :, :old_columns] = old
                buffers[layer] = new

    def open(self, rows: slice | Tensor, columns: Tensor, width: int) -> None:
        """Announce the forward pass of some rows.

        Args:
            rows: of the cache, in the order of the batch. A slice is a view, a tensor of numbers copies what is read.
            columns: that each new token is written to, ``(batch, tokens)``; within what is reserved.
            width: number of columns to attend to.
        """
        numbers = torch.arange(rows.start, rows.stop, device=columns.device) if isinstance(rows, slice) else rows
        self._index, self._numbers, self._new, self._width = rows, numbers[:, None, None], columns[:, None], width
        self._places: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, both ``(batch, heads, tokens, size)``; gives back all of the rows'."""
        pair = []
        for buffers, states in ((self._keys, key_states), (self._values, value_states)):
            batch, heads, tokens, size = states.shape
            if layer_idx == len(buffers):
                buffers.append(states.new_zeros(self._rows, heads, self._columns, size))
            buffer = buffers[layer_idx]
            buffer.view(-1, size).index_copy_(0, self._place(heads), states.reshape(batch * heads * tokens, size))
            pair.append(buffer[self._index, :, : self._width])
        return pair[0], pair[1]

    def swap(self, ones: list[int], others: list[int], width: int) -> None:
        """Exchange the first ``width`` columns of rows pairwise."""
        if not ones or not width:
            return
        for buffer in (*self._keys, *self._values):
            kept = buffer[ones, :, :width]
            buffer[ones, :, :width] = buffer[others, :, :width]
            buffer[others, :, :width] = kept

    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy the first ``width`` columns of rows pairwise."""
        if not sources or not width:
            return
        for buffer in (*self._keys, *self._values):
            buffer[targets, :, :width] = buffer[sources, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that came before the announced forward pass, as far as one number can say."""
        return 0

    def _place(self, heads: int) -> Tensor:
        """Where the new tokens are written in a buffer seen as a list of vectors; the same for all layers alike."""
        if heads not in self._places:
            lines = self._numbers * heads + torch.arange(heads, device=self._numbers.device)[:, None]
            self._places[heads] = (lines * self._columns + self._new).flatten()
        return self._places[heads]

"""A key-value cache whose rows live as long as their episodes: each row has its own length.

Hugging Face caches append the same number of columns to every row, so rows of different length need holes and masks
that remember them. Here a row's tokens stand in columns 0, 1, 2, … without holes: the column of a token *is* its
position, cutting a row back to a common prefix is changing its length, and columns beyond it are never read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class KeyValueRows(Cache):
    """Keys and values of many sequences, ``(rows, heads, columns, size)`` per layer.

    A forward pass is announced by :meth:`open`; the model's layers then call :meth:`update`.

    Args:
        capacity: most tokens, rows times columns. All of it is allocated at the first pass, so that nothing has to grow
            later; ``None`` grows as needed.

    Attributes:
        rows: allocated.
        columns: of each row.
        buffers: keys and values of the first layer, of the second one, …
    """

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.buffers: list[Tensor] = []
        self.rows = 0
        self.columns = 0
        self.open(slice(0, 0), torch.zeros(0, 0, dtype=torch.long), 0)

    def reserve(self, rows: int, columns: int) -> None:
        """Grow to at least this many rows and columns; contents stay.

        Raises:
            ValueError: that is more than the capacity (the caller makes room first, by :meth:`resize`).
        """
        if rows <= self.rows and columns <= self.columns:
            return
        rows, wanted = max(rows, self.rows), max(columns, self.columns)
        if columns > self.columns:
            # Half as much again, so that growing token by token copies little; multiples of 64.
            wanted = -(-max(columns, self.columns * 3 // 2) // 64) * 64
        if self.capacity is not None:
            wanted = max(columns, min(wanted, self.capacity // rows))
        self.resize(rows, wanted)

    def resize(self, rows: int, columns: int) -> None:
        """Resize to exactly this many rows and columns; the contents that fit into both shapes stay.

        Raises:
            ValueError: that is more than the capacity.
        """
        if self.capacity is not None and rows * columns > self.capacity:
            raise ValueError(f"{rows} rows of {columns} columns are more than a cache of {self.capacity} tokens holds")
        kept_rows, kept_columns = min(rows, self.rows), min(columns, self.columns)
        self.rows, self.columns = rows, columns
        for number, old in enumerate(self.buffers):
            kept = old[:kept_rows, :, :kept_columns]
            if self.capacity is None:
                new = self._allocate(old)
            else:
                # The same memory in another shape: one layer's keys or values are copied aside at a time.
                kept = kept.clone()
                new = self._shaped(old, old.shape[1], old.shape[3])
            new[:kept_rows, :, :kept_columns] = kept
            self.buffers[number] = new

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
        for number, states in enumerate((key_states, value_states), start=2 * layer_idx):
            batch, heads, tokens, size = states.shape
            if number == len(self.buffers):
                self.buffers.append(self._allocate(states))
            buffer = self.buffers[number]
            buffer.view(-1, size).index_copy_(0, self._place(heads), states.reshape(batch * heads * tokens, size))
            pair.append(buffer[self._index, :, : self._width])
        return pair[0], pair[1]

    def swap(self, ones: list[int], others: list[int], width: int) -> None:
        """Exchange the first ``width`` columns of rows pairwise."""
        if not ones or not width:
            return
        for buffer in self.buffers:
            kept = buffer[ones, :, :width]
            buffer[ones, :, :width] = buffer[others, :, :width]
            buffer[others, :, :width] = kept

    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy the first ``width`` columns of rows pairwise."""
        if not sources or not width:
            return
        for buffer in self.buffers:
            buffer[targets, :, :width] = buffer[sources, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: rows have lengths of their own, which one number cannot say; masks and positions are passed instead."""
        return 0

    def _allocate(self, like: Tensor) -> Tensor:
        """Room for one layer's keys or values, with the heads, size and precision of ``like``."""
        heads, size = like.shape[1], like.shape[3]
        # Zeros, not empty: masked columns get weight 0, and 0 times what memory may hold (NaN) is NaN.
        if self.capacity is None:
            return like.new_zeros(self.rows, heads, self.columns, size)
        return self._shaped(like.new_zeros(self.capacity * heads * size), heads, size)

    def _shaped(self, memory: Tensor, heads: int, size: int) -> Tensor:
        """A view of a tensor's memory with the current numbers of rows and columns."""
        shape = (self.rows, heads, self.columns, size)
        return memory.new_empty(0).set_(memory.untyped_storage(), 0, shape)  # type: ignore[call-overload, no-any-return]

    def _place(self, heads: int) -> Tensor:
        """Where the new tokens are written in a buffer seen as a list of vectors; the same for all layers alike."""
        if heads not in self._places:
            lines = self._numbers * heads + torch.arange(heads, device=self._numbers.device)[:, None]
            self._places[heads] = (lines * self.columns + self._new).flatten()
        return self._places[heads]

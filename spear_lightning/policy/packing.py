"""Rows of tokens laid end to end without padding, and what several rows begin with computed once.

A causal model's output at a token depends on the tokens before it alone. So rows that begin alike (the attempts at one
task, the turns of one episode) need what they share only once: each row adds its own tokens and attends to those of the
row that it shares with as well. Forward and backward pass are those of the padded rows, up to the order of sums.

The rows are sorted, so that each shares most with the one before it. A row then consists of what it shares with the row
before, wherever these tokens stand, and of its own, which stand together: one attention call with the row's own tokens
as queries and all of its tokens as keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Layout = Literal["padded", "packed", "shared"]
"""How rows go through the model: padded to one length, end to end, or end to end with common beginnings once."""

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segments:
    """Which tokens attend to which: consecutive runs of queries, and the keys of each run.

    The last query of a run sees all of its keys, the one before it all but the last, and so on.

    Attributes:
        queries: tokens of each run.
        keys: number of keys of each run, at least as many.
        index: the keys of all runs, one run after the other, as places among the tokens, int64; ``None`` where the keys
            of each run are its own tokens.
        query_ends: ``[0, q_1, q_1 + q_2, …]``, int32, on the device of the tokens.
        key_ends: likewise of the keys.
    """

    queries: list[int]
    keys: list[int]
    index: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    _masks: list[Tensor | None] = field(default_factory=list)

    @property
    def masks(self) -> list[Tensor | None]:
        """For each run 0 where a query sees a key and -inf elsewhere, float32 ``(queries, keys)``.

        ``None`` where the two are equally many (plainly causal). Runs of equal shape share one. They are made when the
        first layer asks for them: kernels that take all runs at once need none.
        """
        if not self._masks:
            self._masks.extend(_masks_of(self.queries, self.keys, self.query_ends.device))
        return self._masks


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows as one sequence.

    Attributes:
        input_ids: of the tokens that are computed, ``(1, tokens)``.
        position_ids: their positions in their rows, ``(1, tokens)``.
        places: where the token in a row and column stands in the sequence, int64 ``(rows, columns)``; 0 at padding.
        segments: which tokens attend to which.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    segments: Segments

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model that :func:`~spear_lightning.policy.attention.pack_model` has prepared needs beyond the ids.

        The mask is one in name only: given one with four dimensions, models make none of their own.
        """
        no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.input_ids.device)
        return {"position_ids": self.position_ids, "attention_mask": no_mask, "segments": self.segments}


def pack_rows(input_ids: Tensor, mask: Tensor, *, share: bool) -> PackedRows:
    """Lay rows end to end.

    Args:
        input_ids: token ids, ``(rows, columns)``.
        mask: true at tokens, false at padding, which may stand anywhere, ``(rows, columns)``. At least one token.
        share: compute what rows begin with in common once.
    """
    device = input_ids.device
    valid = mask.cpu().numpy()
    ids = input_ids.cpu().numpy()
    lengths = valid.sum(1)
    rows = [ids[number, valid[number]] for number in range(len(ids))]
    order = sorted_for_sharing(rows) if share else list(range(len(rows)))
    places = np.zeros(ids.shape, np.int64)
    positions: list[_Ints] = []
    tokens: list[npt.NDArray[np.int64]] = []
    index: list[_Ints] = []
    queries: list[int] = []
    keys: list[int] = []
    before, paths = np.zeros(0, ids.dtype), np.zeros(0, np.int64)
    end = 0
    for number in order:
        row, length = rows[number], int(lengths[number])
        common = common_length(before, row) if share else 0
        path = np.concatenate([paths[:common], np.arange(end, end + length - common)])
        places[number, valid[number]] = path
        if length > common:
            tokens.append(row[common:])
            positions.append(np.arange(common, length))
            index.append(path)
            queries.append(length - common)
            keys.append(length)
        end += length - common
        before, paths = row, path
    shared = queries != keys
    return PackedRows(
        input_ids=torch.from_numpy(np.concatenate(tokens))[None].to(device),
        position_ids=torch.from_numpy(np.concatenate(positions))[None].to(device),
        places=torch.from_numpy(places).to(device),
        segments=Segments(
            queries=queries,
            keys=keys,
            index=torch.from_numpy(np.concatenate(index)).to(device) if shared else None,
            query_ends=_ends(queries, device),
            key_ends=_ends(keys, device),
        ),
    )


def sorted_for_sharing(rows: list[npt.NDArray[np.integer]]) -> list[int]:
    """Numbers of the rows in the order of their ids, in which each shares most with the row before it."""
    # Big-endian bytes are in the order of the numbers.
    return sorted(range(len(rows)), key=lambda number: (rows[number].astype(">u4").tobytes(), number))


def common_length(one: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> int:
    """How many tokens two rows begin with in common."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


def _ends(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device)


def _masks_of(queries: list[int], keys: list[int], device: torch.device) -> list[Tensor | None]:
    made: dict[tuple[int, int], Tensor] = {}
    for shape in set(zip(queries, keys, strict=True)):
        if shape[0] != shape[1]:
            hidden = torch.ones(shape, dtype=torch.bool, device=device).triu(shape[1] - shape[0] + 1)
            made[shape] = torch.zeros(shape, device=device).masked_fill_(hidden, -torch.inf)
    return [made.get(shape) for shape in zip(queries, keys, strict=True)]

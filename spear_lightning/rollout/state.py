"""The replay buffers of all ranks in a checkpoint, and how they are dealt over another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from spear_lightning.algorithm.replay import ReplayBuffer
from spear_lightning.randomness import stream_seed
from spear_lightning.rollout.episode import Row


def replay_to_state(replay: ReplayBuffer) -> dict[str, Any]:
    """A buffer as plain types and tensors, which a checkpoint can hold without pickling our classes."""
    state = replay.state_dict()
    return {**state, "entries": [{**entry, "payload": _to_tensors(entry["payload"])} for entry in state["entries"]]}


def load_replay(
    replay: ReplayBuffer, states: Sequence[dict[str, Any]] | ReplayFiles, rank: int, world_size: int
) -> None:
    """Fill this rank's buffer from the saved buffers of all ranks.

    With as many ranks as then, each takes its own back. Otherwise entries are dealt by a hash of their key: none is
    lost, none is doubled.

    Args:
        replay: this rank's buffer.
        states: one per rank of the run that saved them, from :func:`replay_to_state`. Each is asked for once.
        rank: of this process.
        world_size: number of processes now.
    """
    if len(states) == world_size:
        entries = states[rank]["entries"]
    else:
        entries = [
            entry
            for number in range(len(states))
            for entry in states[number]["entries"]
            if stream_seed("re-deal", entry["key"]) % world_size == rank
        ]
    replay.load_state_dict({"entries": [{**entry, "payload": _to_row(entry["payload"])} for entry in entries]})


class ReplayFiles:
    """The buffers of all ranks in a folder, one file a rank, of which no more than one is held at a time.

    Args:
        folder: of a checkpoint's rank files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, replay: ReplayBuffer, rank: int) -> None:
        """Write the buffer of a rank."""
        torch.save(replay_to_state(replay), self._file(rank))

    def __len__(self) -> int:
        return len(list(self._folder.glob("rank-*.pt")))

    def __getitem__(self, rank: int) -> dict[str, Any]:
        """The saved buffer of a rank.

        Raises:
            ValueError: its file is missing or damaged.
        """
        path = self._file(rank)
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise ValueError(f"the replay buffer of rank {rank} cannot be read from {path}: {error}") from error
        return state

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.pt"


def _to_tensors(row: Row) -> dict[str, torch.Tensor]:
    return {field.name: torch.from_numpy(getattr(row, field.name).copy()) for field in fields(row)}


def _to_row(tensors: dict[str, torch.Tensor]) -> Row:
    return Row(**{name: tensor.numpy() for name, tensor in tensors.items()})

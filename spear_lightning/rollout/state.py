"""The replay buffers of all ranks in a checkpoint, and how they are dealt over another number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from spear_lightning.algorithm.replay import ReplayBuffer
from spear_lightning.randomness import stream_seed
from spear_lightning.rollout.episode import Row


def replay_to_state(replay: ReplayBuffer) -> dict[str, Any]:
    """A buffer as plain types and tensors, which a checkpoint can hold without pickling our classes."""
    state = replay.state_dict()
    return {**state, "entries": [{**entry, "payload": _to_tensors(entry["payload"])} for entry in state["entries"]]}


def load_replay(replay: ReplayBuffer, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
    """Fill this rank's buffer from the saved buffers of all ranks.

    With as many ranks as then, each takes its own back. Otherwise entries are dealt by a hash of their key: none is
    lost, none is doubled.

    Args:
        replay: this rank's buffer.
        states: one per rank of the run that saved them, from :func:`replay_to_state`.
        rank: of this process.
        world_size: number of processes now.
    """
    if len(states) == world_size:
        entries = states[rank]["entries"]
    else:
        everything = [entry for state in states for entry in state["entries"]]
        entries = [entry for entry in everything if stream_seed("re-deal", entry["key"]) % world_size == rank]
    replay.load_state_dict({"entries": [{**entry, "payload": _to_row(entry["payload"])} for entry in entries]})


def _to_tensors(row: Row) -> dict[str, torch.Tensor]:
    return {field.name: torch.from_numpy(getattr(row, field.name).copy()) for field in fields(row)}


def _to_row(tensors: dict[str, torch.Tensor]) -> Row:
    return Row(**{name: tensor.numpy() for name, tensor in tensors.items()})

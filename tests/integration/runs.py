"""Settings of small runs on several ranks, and what they leave."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from spear_lightning.algorithm import ReplayBuffer
from spear_lightning.checkpoint.manifest import MANIFEST, problem
from spear_lightning.checkpoint.rank_state import load_replay

# Plain SGD: Adam's first steps have the size of the learning rate whatever the gradient, and would hide an error in it.
PLAIN: dict[str, Any] = {
    "trainer.num_sanity_val_steps": 0,
    "trainer.check_val_every_n_epoch": 10,
    "model.loss": {"class_path": "PPOClip"},  # Clip-Cov looks at a micro-batch at a time, so the cut shows
    "model.replay_loss": {"class_path": "PPOClip"},
    "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "seed_everything": 2,  # a seed whose first iteration holds wins: what it stores, the second replays
    "data.reward.invalid_penalty": 0.1,  # tells turns apart even where no episode succeeds
    "data.max_tokens": 1500,  # several micro-batches a step, not the same number in each
    "trainer.callbacks": [
        {"class_path": "CurriculumSchedule", "init_args": {"imitation_warmup": 1, "tool_reward_decay": 2}},
        {"class_path": "RolloutProgress"},
        {"class_path": "ShardedCheckpoint", "init_args": {"keep": 9, "monitor": None}},
    ],
}
# Where a gradient is next to nothing Adam's step is the sign of its rounding, which differs with the number of ranks:
# not so with an epsilon above that.
ADAM: dict[str, Any] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "eps": 1.0e-5}}


def zero(stage: int, ranks: int = 2, **more: object) -> dict[str, Any]:
    """Settings of a run under ZeRO, with buckets that fit a test."""
    buckets = {"allgather_bucket_size": 1_000_000, "reduce_bucket_size": 1_000_000}
    strategy = {"class_path": "ZeroStrategy", "init_args": {"stage": stage, **buckets, **more}}
    return {**PLAIN, "trainer.devices": ranks, "trainer.strategy": strategy}


def curve(directory: Path) -> list[dict[str, str]]:
    """The metrics of a run without those that tell the time."""
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: value for name, value in row.items() if not name.startswith("time/") and "per_second" not in name}
        for row in rows
    ]


def weights(state: Path) -> dict[str, torch.Tensor]:
    """The weights in the state of a checkpoint, however they are stored."""
    if (state.parent / MANIFEST).exists():
        assert problem(state.parent, hashes=True) is None
    if state.is_file():
        return torch.load(state, weights_only=False)["state_dict"]
    shards = state / "checkpoint"
    if not list(shards.glob("*optim_states.pt")):  # stage 0: nothing is partitioned
        return torch.load(shards / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(state, tag="checkpoint")


def replay(checkpoint: Path, rank: int) -> list[dict[str, Any]]:
    """The replay entries of a rank, their rows whole again."""
    return entries_of(torch.load(checkpoint / f"ranks/rank-{rank:05d}.pt", weights_only=True)["replay"])


def entries_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a saved replay buffer, their rows whole again."""
    buffer = ReplayBuffer()
    load_replay(buffer, [state], 0, 1)
    found = []
    for entry in buffer.state_dict()["entries"]:
        row = entry["payload"].with_advantage(0.0)
        payload = {name: torch.from_numpy(getattr(row, name)) for name in ("ids", "mask", "logps", "turns")}
        found.append({**entry, "payload": payload})
    return found

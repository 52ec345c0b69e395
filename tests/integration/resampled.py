"""Training with dynamic sampling on a toy, in one process or several, for the tests that it does not matter."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.algorithm import Mix, QualityFilters, ReinforcePlusPlusBaseline, ReplayBuffer, RewardComposer
from spear_lightning.callbacks import RolloutProgress
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.metrics.csv_logger import MetricsCSV
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.datamodule import RolloutDataModule
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.training.module import SpearModule
from tests.environments.tiny_environments import Tossed


class Watch(Callback, RolloutHooks):
    """What was told of rounds, and the episodes of each iteration."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.last = 0
        self.iterations: list[dict[str, Any]] = []

    def on_rollout_start(self, trainer: Any, pl_module: Any, split: str, episodes: int) -> None:
        self.rounds.append(episodes)
        self.last = 0

    def on_rollout_step(self, trainer: Any, pl_module: Any, finished: int, active: int) -> None:
        assert self.last <= finished
        assert finished + active <= self.rounds[-1]
        self.last = finished

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        episodes = [
            [item.group, item.index, item.task.id, item.reward, item.group_std, item.group_kept]
            for item in rollout.episodes
        ]
        batch = [item.in_batch for item in rollout.episodes]
        self.iterations.append({"rounds": self.rounds, "episodes": episodes, "batch": batch})
        self.rounds = []


def train(folder: Path, *, epochs: int = 3, ranks: int = 1, resample: int = 2, checkpoint: Path | None = None) -> None:
    """Train, and leave metrics, episodes by rank and the last checkpoint in a folder."""
    data = RolloutDataModule(
        Tossed(),
        TranscriptAgent(),
        HuggingFaceEngine(),
        rollouts=TrainingRollouts(tasks=4, group_size=4, resample=resample),
        advantage=ReinforcePlusPlusBaseline(),
        reward=RewardComposer(success=1.0, invalid_penalty=0.0),
        filters=QualityFilters(overlong=False, incomplete=False, repetitive=False, unreadable=False, keep_share=1.0),
        replay=ReplayBuffer(schedule=Mix(ratio=0.5)),
        max_turns=1,
        max_response_tokens=8,
        minibatches=2,
        workers=1,
        seed=4,
    )
    module = SpearModule(Policy("embedded"), optimizer=partial(torch.optim.SGD, lr=0.02))
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=epochs,
        logger=MetricsCSV(str(folder)),
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch, RolloutProgress(plain=False)],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(litlogger|num_workers|does not have many workers).*")
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    trainer.save_checkpoint(folder / "last.ckpt")
    (folder / f"iterations-{trainer.global_rank}.json").write_text(json.dumps(watch.iterations))

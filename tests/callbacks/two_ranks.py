"""What ranks do in the tests of ShardedCheckpoint under ZeRO: functions that a new process can import."""

from __future__ import annotations

import resource
import signal
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from spear_lightning.callbacks import ShardedCheckpoint
from spear_lightning.callbacks.checkpoint import resolve_checkpoint
from spear_lightning.hooks import RankState
from spear_lightning.strategies import ZeroStrategy
from tests.callbacks.tiny import TinyData, TinyModule, make_trainer


class Ballast(TinyModule):
    """Every weight says how many updates it has had; there are enough of them that writing takes time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def training_step(self, batch: float, batch_idx: int) -> None:
        strategy = self.trainer.strategy
        assert isinstance(strategy, ZeroStrategy)
        self.manual_backward(strategy.engine(1.0))
        self.optimizers().step()
        time.sleep(0.01)

    def forward(self, scale: float) -> torch.Tensor:
        return -scale * self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


class RankData(TinyData, RankState):
    """Each rank holds its own number and the iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.restored: Any = None

    def save_rank_state(self, folder: Path) -> None:
        trainer: Any = self.trainer
        torch.save((trainer.global_rank, trainer.current_epoch), folder / f"rank-{trainer.global_rank:05d}.pt")

    @contextmanager
    def rank_state_apart(self) -> Any:
        yield


class Limit(Callback):
    """From the third iteration on, a rank can write no file above a size."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2 and trainer.global_rank == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def train(
    folder: Path,
    stage: int = 2,
    *,
    size: int = 400_000,
    epochs: int = 1000,
    keep: int = 2,
    on_error: Any = "raise",
    callbacks: Any = (),
) -> None:
    """Train and save after each iteration; go on from what is there."""
    checkpoint = ShardedCheckpoint(keep=keep, monitor=None, on_error=on_error)
    trainer = make_trainer(
        folder,
        [*callbacks, checkpoint],
        strategy=ZeroStrategy(stage=stage, allgather_bucket_size=1_000_000, reduce_bucket_size=1_000_000),
        devices=2,
        max_epochs=epochs,
        enable_checkpointing=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Ballast(size), datamodule=RankData(), ckpt_path=resolve_checkpoint("last", trainer))
    (folder / f"epochs-{trainer.global_rank}.txt").write_text(str(trainer.current_epoch))


def train_limited(folder: Path, on_error: str, rank: int) -> None:
    """Train four iterations, of which the third cannot be saved by one rank."""
    train(folder, epochs=4, keep=9, on_error=on_error, callbacks=[Limit(rank, 300_000)])

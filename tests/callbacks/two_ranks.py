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
from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.training.hooks import RankState
from tests.callbacks.tiny import TinyData, TinyModule, make_trainer

BUCKETS = {"allgather_bucket_size": 1_000_000, "reduce_bucket_size": 1_000_000}


class Ballast(TinyModule):
    """Every weight says how many updates it has had; there are enough of them that writing takes time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

    def training_step(self, batch: float, batch_idx: int) -> None:
        strategy = self.trainer.strategy
        self.manual_backward((strategy.engine if isinstance(strategy, ZeroStrategy) else self)(1.0))
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


class Measured(ShardedCheckpoint):
    """Writes down by how many bytes a save raised the process's peak of memory."""

    def _save(self, trainer: Any, iteration: int, score: float | None) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        super()._save(trainer, iteration, score)
        folder = Path(trainer.default_root_dir)
        (folder / f"peak-{trainer.global_rank}.txt").write_text(str(_status("VmHWM") - before))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Adam(Ballast):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def measure(folder: Path, stage: int, size: int) -> None:
    """Two iterations with Adam; the peak of the second save."""
    train(folder, stage, module=Adam(size), epochs=2, checkpoint=Measured(monitor=None))


def train(
    folder: Path,
    stage: int | None = 2,
    *,
    module: Ballast | None = None,
    epochs: int = 1000,
    checkpoint: ShardedCheckpoint | None = None,
    callbacks: Any = (),
) -> None:
    """Train and save after each iteration, under ZeRO or DDP (``None``); go on from what is there."""
    checkpoint = checkpoint or ShardedCheckpoint(monitor=None)
    trainer = make_trainer(
        folder,
        [*callbacks, checkpoint],
        strategy="ddp" if stage is None else ZeroStrategy(stage, **BUCKETS),
        devices=2,
        max_epochs=epochs,
        enable_checkpointing=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module or Ballast(400_000), datamodule=RankData(), ckpt_path=resolve_checkpoint("last", trainer))
    (folder / f"epochs-{trainer.global_rank}.txt").write_text(str(trainer.current_epoch))


def train_limited(folder: Path, stage: int | None, on_error: Any, rank: int) -> None:
    """Train four iterations, of which the third cannot be saved by one rank."""
    checkpoint = ShardedCheckpoint(keep=9, monitor=None, on_error=on_error)
    train(folder, stage, epochs=4, checkpoint=checkpoint, callbacks=[Limit(rank, 300_000)])

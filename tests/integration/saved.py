"""A callback that writes down what has been loaded, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class SaveOnStart(Callback):
    """Saves the state as training starts: the strategy's, and what each rank holds."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / "ranks").mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.folder / "state")
        trainer.datamodule.save_rank_state(self.folder / "ranks")

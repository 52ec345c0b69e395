"""A callback that sends a rank a signal in the middle of an iteration, for tests of pre-emption and of lost ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Strike(Callback):
    """Some ranks send themselves a signal before an update; each does so once, whatever is started again.

    Args:
        folder: of the run; remembers who has been struck.
        iteration: from 1.
        ranks: that are struck.
        name: of the signal.
    """

    def __init__(self, folder: str, iteration: int, ranks: Sequence[int], name: str = "SIGTERM") -> None:
        self.folder, self.iteration, self.ranks, self.name = Path(folder), iteration, ranks, name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch + 1 != self.iteration or batch_idx != 1 or trainer.global_rank not in self.ranks:
            return
        struck = self.folder / f"struck-{self.name}-{self.iteration}-{trainer.global_rank}"
        if not struck.exists():
            struck.write_text("")
            os.kill(os.getpid(), getattr(signal, self.name))

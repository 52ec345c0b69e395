"""A callback that makes one rank come late, for the test of the time-out."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback


class Late(Callback):
    """Rank 1 sleeps before its first update."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(self.seconds)

"""How callbacks log what belongs to an iteration."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl


def log_iteration(trainer: pl.Trainer, pl_module: pl.LightningModule, values: Mapping[str, float]) -> None:
    """Log values of the current iteration, at its number, to every logger and for callbacks that monitor metrics.

    Loggers get them at once. Lightning would pass them on after the checkpoint of the iteration is written, and a run
    that is killed in between and resumed would have lost them.

    Args:
        trainer: whose ``current_epoch`` is the number of the iteration.
        pl_module: to log with, in a hook that may log.
        values: by name, equal on all ranks.
    """
    # Only monitors see these: the value is the same on every rank, and the mean over ranks leaves it so. A batch size
    # is given because Lightning cannot guess that of a minibatch of episodes.
    pl_module.log_dict(dict(values), logger=False, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.current_epoch)

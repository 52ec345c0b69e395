"""What several callbacks do: log what belongs to an iteration, say where a run stands, write and print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table


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


def completed_iterations(trainer: pl.Trainer) -> int:
    """Number of iterations the policy that is evaluated now has behind it.

    During ``fit`` Lightning validates before it counts the epoch; the sanity check comes before the first one.
    """
    within_epoch = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return trainer.current_epoch + int(within_epoch)


def make_folder(folder: Path, owner: str) -> None:
    """Make a folder and find out whether it can be written, before anything is played.

    Args:
        folder: to make.
        owner: callback that will write there, for the message.

    Raises:
        MisconfigurationException: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise MisconfigurationException(
            f"{owner} cannot write to {folder} ({error.strerror}): set {owner}.directory, or run.directory"
        ) from error


def print_table(table: Table, width: int) -> None:
    """Print a table; a pipe has no width of its own, and a table cut to 80 columns would lose its last ones."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, width))
    console.print(table)

"""Show how a run is going: bars on a terminal, one line per iteration anywhere else."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import override

from spear_lightning.callbacks.logs import completed_iterations
from spear_lightning.environments.base import Split
from spear_lightning.metrics.evaluation import Results
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.utils.ranges import Above0, in_range

_NAMES = {TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "predict"}


@in_range
class RolloutProgress(ProgressBar, RolloutHooks):
    """Progress of the run, of the rollout that is being played, and of the updates on it.

    On a terminal three bars are shown, with the success, reward and entropy of the last iteration. Anywhere else (a
    file, a pipe, a batch job) one line is printed per iteration and per evaluation. It takes the place of Lightning's
    progress bar, which would show epochs and batches only.

    Args:
        refresh_rate: how often the bars are drawn, at most, per second.
        plain: ``True`` prints lines also on a terminal, ``False`` draws bars also elsewhere, ``None`` looks.

    Raises:
        ValueError: ``refresh_rate`` is not above 0. (Lightning itself refuses a progress bar together with
            ``enable_progress_bar=False``, and two of them.)

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import RolloutProgress
        >>> trainer = Trainer(callbacks=[RolloutProgress()], logger=False, enable_checkpointing=False)
        >>> type(trainer.progress_bar_callback).__name__
        'RolloutProgress'
    """

    def __init__(self, refresh_rate: Above0 = 5.0, plain: bool | None = None) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self.plain = plain
        self._enabled = True
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._drawn = 0.0
        self._training, self._evaluation = Results(), Results()
        self._seconds: dict[str, float] = {}
        self._iteration_start = self._phase_start = self._update_start = time.perf_counter()

    # --- Lightning's interface of a progress bar -----------------------------------------------------------------

    def disable(self) -> None:
        """Show nothing from now on (Lightning calls it on all ranks but the first)."""
        self._enabled = False
        self._close()

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        if self._progress is not None:
            self._progress.console.print(*args, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(*args, **{"flush": True, **kwargs})

    # --- phases --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new iteration: forget the last one."""
        self._iteration_start = time.perf_counter()
        self._seconds = {}
        self._training = Results()
        self._open(trainer)
        self._update("updates", completed=0, total=_finite(self.total_train_batches), force=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of an update; before it the rollout was played."""
        self._update_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One update is done."""
        self._seconds["update"] = self._seconds.get("update", 0.0) + time.perf_counter() - self._update_start
        self._update("updates", completed=batch_idx + 1)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One iteration is done."""
        iteration, last = trainer.current_epoch + 1, _iterations(trainer) or "?"
        self._update("run", completed=iteration, text=_figures(self._training), force=True)
        if self._progress is None:
            seconds = time.perf_counter() - self._iteration_start
            parts = ", ".join(f"{name} {value:.1f}" for name, value in self._seconds.items() if value >= 0.05)
            self.print(
                f"iteration {iteration:{len(str(last))}d}/{last}  {_figures(self._training)}  "
                f"{seconds:.1f} s" + (f" ({parts})" if parts else "")
            )

    def on_rollout_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split, episodes: int) -> None:
        """Show an empty bar for the episodes."""
        self._update("rollout", completed=0, total=episodes, text="" if split == "train" else split, force=True)

    def on_rollout_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, finished: int, active: int) -> None:
        """Some episodes may have finished."""
        self._update("rollout", completed=finished)

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Take the figures of the episodes."""
        if rollout.split != "train":
            self._evaluation.add(rollout)
            return
        self._training = Results().add(rollout).over_ranks()
        for name, seconds in rollout.seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An evaluation begins; prediction plays episodes too."""
        self._phase_start = time.perf_counter()
        self._evaluation = Results()
        self._open(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the outcome of an evaluation, a test or a prediction."""
        # Ranks may have played in a different number of parts: add up here, then over ranks.
        results, self._evaluation = self._evaluation.over_ranks(), Results()
        rate = results.success
        if not rate.episodes:
            return
        name = _NAMES.get(trainer.state.fn or TrainerFn.VALIDATING, "validation")
        low, high = rate.interval()
        aborted = f", {results.aborted} aborted" if results.aborted else ""
        seconds = time.perf_counter() - self._phase_start
        self.print(
            f"{name} after {completed_iterations(trainer)} iterations: success {rate.share:.3f} "
            f"[{low:.3f}, {high:.3f}] ({rate.successes}/{rate.episodes} episodes{aborted})  {seconds:.1f} s"
        )

    on_test_end = on_predict_end = on_validation_end

    on_test_start = on_predict_start = on_validation_start

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bars before the message is printed."""
        self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    # --- display -------------------------------------------------------------------------------------------------

    def _open(self, trainer: pl.Trainer) -> None:
        console = Console()
        plain = self.plain if self.plain is not None else not console.is_terminal or console.is_dumb_terminal
        if plain or not self._enabled or self._progress is not None:
            return
        # Drawn when something happens and not by a thread: rollouts start processes, and forking with a thread that
        # holds the console's lock can hang.
        self._progress = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            auto_refresh=False,
        )
        for name, total in (("run", _iterations(trainer)), ("rollout", None), ("updates", None)):
            self._bars[name] = self._progress.add_task(name, total=total, completed=0, text="")
        self._progress.update(self._bars["run"], completed=trainer.current_epoch)
        self._progress.start()

    def _update(self, bar: str, *, force: bool = False, **values: Any) -> None:
        if self._progress is None:
            return
        self._progress.update(self._bars[bar], **values)
        now = time.perf_counter()
        if force or now - self._drawn >= 1 / self.refresh_rate:
            self._drawn = now
            self._progress.refresh()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()


def _iterations(trainer: pl.Trainer) -> int | None:
    """Of the whole run, where they are bounded."""
    return trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None


def _finite(number: int | float) -> int | None:
    return int(number) if math.isfinite(number) else None


def _figures(results: Results) -> str:
    if not results.records:
        return "no episodes"
    entropy = "" if math.isnan(results.entropy) else f"  entropy {results.entropy:.3f}"
    return f"success {results.success.share:.3f}  reward {results.reward:+.3f}{entropy}"

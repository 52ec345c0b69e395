"""The learning curve: held-out success with its uncertainty, before, during and after training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table

from spear_lightning.callbacks.logs import completed_iterations, make_folder, print_table
from spear_lightning.callbacks.plot import draw_curve
from spear_lightning.metrics.evaluation import Rate, Results
from spear_lightning.metrics.intervals import newcombe
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.utils.atomic import write_atomically
from spear_lightning.utils.ranges import Confidence, in_range


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out success at one point of the run.

    Attributes:
        iteration: number of iterations done before it.
        updates: number of optimizer steps done before it.
        episodes: played.
        successes: of these.
        aborted: episodes whose environment failed; not among ``episodes``.
        task_types: ``(successes, episodes)`` by task type.
    """

    iteration: int
    updates: int
    episodes: int
    successes: int
    aborted: int
    task_types: dict[str, tuple[int, int]]

    @property
    def rate(self) -> Rate:
        """Of all episodes."""
        return Rate(self.successes, self.episodes)


@dataclass(frozen=True, slots=True)
class TrainingPoint:
    """What the policy did in one training rollout.

    Attributes:
        iteration: its number.
        episodes: played.
        success: share that succeeded.
        reward: mean composed reward.
        entropy: mean policy entropy per token in nats, ``None`` where unknown.
    """

    iteration: int
    episodes: int
    success: float
    reward: float
    entropy: float | None


@in_range
class LearningCurve(Callback, RolloutHooks):
    """Collects held-out success at every validation, draws it and reports what training has changed.

    Written to ``directory`` at every validation during ``fit``:

    - ``learning_curve.png``: held-out success with its Wilson interval over iterations; policy entropy and success in
      training beside it,
    - ``evaluations.json``: the numbers, by task type too.

    When ``fit`` ends, a table compares the first and the last evaluation. The first is the policy before training if
    the trainer checks all of it (``num_sanity_val_steps: -1``), or if ``validate`` was called before ``fit`` with the
    same trainer. Intervals take episodes as independent, so they are too narrow where a task is played several times. A
    resumed run continues its curve.

    Args:
        directory: where to write; ``None`` for the trainer's log directory.
        confidence: two-sided coverage of the intervals.
        table: whether to print tables.

    Raises:
        ValueError: ``confidence`` is not in (0, 1).
        MisconfigurationException: the directory cannot be written.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import LearningCurve
        >>> curve = LearningCurve(directory="runs/example")
        >>> trainer = Trainer(callbacks=[curve], num_sanity_val_steps=-1, logger=False, enable_checkpointing=False)
        >>> curve.evaluations
        []
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, confidence: Confidence = 0.95, table: bool = True
    ) -> None:
        super().__init__()
        self.directory = None if directory is None else Path(directory)
        self.confidence = confidence
        self.table = table
        self._folder = self.directory or Path()
        self._evaluations: dict[int, Evaluation] = {}
        self._training: dict[int, TrainingPoint] = {}
        self._results = Results()

    @property
    def evaluations(self) -> list[Evaluation]:
        """Held-out evaluations so far, by iteration."""
        return [self._evaluations[iteration] for iteration in sorted(self._evaluations)]

    @property
    def training(self) -> list[TrainingPoint]:
        """Training rollouts so far, by iteration."""
        return [self._training[iteration] for iteration in sorted(self._training)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the directory and make sure that it can be written, before anything is played."""
        self._results = Results()
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # agreed on by all ranks: every rank has to ask
        self._folder = self.directory or log_dir
        if stage == "fit":
            make_folder(self._folder, "LearningCurve")

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Take the figures of a rollout; an evaluation may come in several parts."""
        if rollout.split != "train":
            self._results.add(rollout)
            return
        played = Results().add(rollout).over_ranks()
        if played.records:
            self._training[rollout.iteration] = TrainingPoint(
                iteration=rollout.iteration,
                episodes=len(played.records),
                success=played.success.share,
                reward=played.reward,
                entropy=None if math.isnan(played.entropy) else played.entropy,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a point to the curve."""
        results, self._results = self._results.over_ranks(), Results()
        # A resumed run checks again before it goes on; its curve has that point already.
        if not results.records or (trainer.sanity_checking and self._evaluations):
            return
        iteration = completed_iterations(trainer)
        self._evaluations[iteration] = Evaluation(
            iteration=iteration,
            updates=trainer.global_step,
            episodes=results.success.episodes,
            successes=results.success.successes,
            aborted=results.aborted,
            task_types={name: (*rate,) for name, rate in results.by_type.items()},  # plain, for a checkpoint
        )
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            self._write(picture=not trainer.sanity_checking)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Neither a test nor a prediction is a point of the curve."""
        self._results = Results()

    on_predict_end = on_test_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the picture, and compare the first evaluation with the last."""
        if not trainer.is_global_zero or not self._evaluations:
            return
        if self.training and self.training[-1].iteration >= self.evaluations[-1].iteration:
            self._write()  # iterations that no validation followed
        first, *others = self.evaluations
        if self.table:
            print_table(comparison([first, *others[-1:]], "Held-out success", self.confidence), 110)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "training": [asdict(point) for point in self.training],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of :meth:`state_dict`."""
        evaluations = [Evaluation(**values) for values in state_dict["evaluations"]]
        self._evaluations = {evaluation.iteration: evaluation for evaluation in evaluations}
        self._training = {point["iteration"]: TrainingPoint(**point) for point in state_dict["training"]}

    def _write(self, picture: bool = True) -> None:
        write_atomically(self._folder / "evaluations.json", json.dumps(self._report(), indent=2) + "\n")
        if not picture:  # one point is no curve
            return
        content = draw_curve(
            evaluations=[(e.iteration, e.rate.share, *e.rate.interval(self.confidence)) for e in self.evaluations],
            training=[(p.iteration, p.success, p.entropy) for p in self.training],
            episodes=max(e.episodes for e in self.evaluations),
            confidence=self.confidence,
        )
        write_atomically(self._folder / "learning_curve.png", content)

    def _report(self) -> dict[str, Any]:
        def told(rate: Rate) -> dict[str, Any]:
            return {
                "episodes": rate.episodes,
                "successes": rate.successes,
                "success": rate.share,
                "interval": list(rate.interval(self.confidence)),
            }

        return {
            "confidence": self.confidence,
            "evaluations": [
                {
                    "iteration": evaluation.iteration,
                    "updates": evaluation.updates,
                    **told(evaluation.rate),
                    "aborted": evaluation.aborted,
                    "by_task_type": {name: told(Rate(*counts)) for name, counts in evaluation.task_types.items()},
                }
                for evaluation in self.evaluations
            ],
            "training": [asdict(point) for point in self.training],
        }


def comparison(evaluations: Sequence[Evaluation], title: str, confidence: float) -> Table:
    """A table of one evaluation, or of two and their difference.

    Args:
        evaluations: one, or two in order of time.
        title: above the table.
        confidence: two-sided coverage of the intervals.
    """
    table = Table(title=f"{title} ({confidence:.0%} intervals)", title_justify="left")
    table.add_column("task type")
    for evaluation in evaluations:
        done = f"after {evaluation.iteration} iterations" if evaluation.iteration else "before training"
        table.add_column(done, justify="right")
        table.add_column("games", justify="right")
    if len(evaluations) == 2:
        table.add_column("difference", justify="right")

    def cells(rates: Sequence[Rate]) -> list[str]:
        texts = []
        for rate in rates:
            low, high = rate.interval(confidence)
            texts += [f"{rate.share:.1%} [{low:.1%}, {high:.1%}]" if rate.episodes else "–", str(rate.episodes)]
        if len(rates) == 2:
            low, high = newcombe(rates[0], rates[1], confidence)
            difference = rates[1].share - rates[0].share
            both = f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            texts.append(both if all(rate.episodes for rate in rates) else "–")
        return texts

    task_types = sorted({name for evaluation in evaluations for name in evaluation.task_types})
    if len(task_types) > 1:
        for name in task_types:
            table.add_row(name or "(none)", *cells([Rate(*each.task_types.get(name, (0, 0))) for each in evaluations]))
        table.add_section()
    table.add_row("all", *cells([evaluation.rate for evaluation in evaluations]), style="bold")
    return table

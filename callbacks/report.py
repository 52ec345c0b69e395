"""The learning curve: held-out success with its uncertainty, before, during and after training."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from spear_lightning.callbacks.plot import draw_curve
from spear_lightning.callbacks.summary import RolloutSummary, completed_iterations
from spear_lightning.distributed.collectives import gather
from spear_lightning.metrics.intervals import newcombe, wilson
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.utils.atomic import write_atomically


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out success at one point of the run.

    Attributes:
        iteration: number of iterations done before it.
        updates: number of optimizer steps done before it.
        episodes: played.
        successes: of these.
        aborted: episodes whose environment failed; not among ``episodes``.
        kinds: ``(successes, episodes)`` by task type.
    """

    iteration: int
    updates: int
    episodes: int
    successes: int
    aborted: int
    kinds: dict[str, tuple[int, int]]

    @property
    def success(self) -> float:
        """Share of episodes that succeeded."""
        return self.successes / self.episodes


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
        MisconfigurationException: ``confidence`` is not in (0, 1), or the directory cannot be written.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import LearningCurve
        >>> curve = LearningCurve(directory="runs/example")
        >>> trainer = Trainer(callbacks=[curve], num_sanity_val_steps=-1, logger=False, enable_checkpointing=False)
        >>> curve.evaluations
        []
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, confidence: float = 0.95, table: bool = True
    ) -> None:
        super().__init__()
        if not 0 < confidence < 1:
            raise MisconfigurationException(f"LearningCurve: confidence must be in (0, 1), not {confidence}")
        self.directory = None if directory is None else Path(directory)
        self.confidence = confidence
        self.table = table
        self._folder = self.directory or Path()
        self._evaluations: dict[int, Evaluation] = {}
        self._training: dict[int, TrainingPoint] = {}
        self._parts: list[RolloutSummary] = []

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
        self._parts.clear()
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)  # agreed on by all ranks: every rank has to ask
        self._folder = self.directory or log_dir
        if stage != "fit":
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MisconfigurationException(
                f"LearningCurve: cannot make the directory {self._folder} ({error.strerror}); set "
                "LearningCurve.directory"
            ) from error
        if not os.access(self._folder, os.W_OK):
            raise MisconfigurationException(
                f"LearningCurve: cannot write to the directory {self._folder}; set LearningCurve.directory"
            )

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Take the figures of a rollout; an evaluation may come in several parts."""
        if rollout.split != "train":
            self._parts.append(RolloutSummary.of(rollout))
            return
        summary = RolloutSummary.over_ranks(rollout)
        if summary.episodes:
            self._training[rollout.iteration] = TrainingPoint(
                iteration=rollout.iteration,
                episodes=summary.episodes,
                success=summary.success,
                reward=summary.mean_reward,
                entropy=None if math.isnan(summary.mean_entropy) else summary.mean_entropy,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a point to the curve."""
        evaluation = self._evaluate(trainer)
        # A resumed run checks again before it goes on; its curve has that point already.
        if evaluation is None or (trainer.sanity_checking and self._evaluations):
            return
        self._evaluations[evaluation.iteration] = evaluation
        if not trainer.is_global_zero:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._write(picture=not trainer.sanity_checking)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A test is no point of the curve."""
        self._parts.clear()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predictions are no evaluation."""
        self._parts.clear()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the picture, and compare the first evaluation with the last."""
        if not trainer.is_global_zero or not self._evaluations:
            return
        if self.training and self.training[-1].iteration >= self.evaluations[-1].iteration:
            self._write()  # iterations that no validation followed
        first, *others = self.evaluations
        self._print([first, others[-1]] if others else [first], "Held-out success")

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

    def _evaluate(self, trainer: pl.Trainer) -> Evaluation | None:
        # Ranks may have played in a different number of parts: add up here, then over ranks.
        summary = reduce(add, gather(reduce(add, self._parts, RolloutSummary())))
        self._parts.clear()
        if not summary.episodes:
            return None
        return Evaluation(
            iteration=completed_iterations(trainer),
            updates=trainer.global_step,
            episodes=summary.episodes,
            successes=summary.successes,
            aborted=summary.aborted,
            kinds={
                kind: (summary.kind_successes[kind], episodes)
                for kind, episodes in sorted(summary.kind_episodes.items())
            },
        )

    def _write(self, picture: bool = True) -> None:
        write_atomically(self._folder / "evaluations.json", json.dumps(self._report(), indent=2) + "\n")
        if not picture:  # one point is no curve
            return
        content = draw_curve(
            evaluations=[(e.iteration, e.success, *self._interval(e.successes, e.episodes)) for e in self.evaluations],
            training=[(p.iteration, p.success, p.entropy) for p in self.training],
            episodes=max(e.episodes for e in self.evaluations),
            confidence=self.confidence,
        )
        write_atomically(self._folder / "learning_curve.png", content)

    def _interval(self, successes: int, episodes: int) -> tuple[float, float]:
        return wilson(successes, episodes, self.confidence)

    def _report(self) -> dict[str, Any]:
        def rate(successes: int, episodes: int) -> dict[str, Any]:
            return {
                "episodes": episodes,
                "successes": successes,
                "success": successes / episodes,
                "interval": list(self._interval(successes, episodes)),
            }

        return {
            "confidence": self.confidence,
            "evaluations": [
                {
                    "iteration": evaluation.iteration,
                    "updates": evaluation.updates,
                    **rate(evaluation.successes, evaluation.episodes),
                    "aborted": evaluation.aborted,
                    "by_task_type": {kind: rate(*counts) for kind, counts in evaluation.kinds.items()},
                }
                for evaluation in self.evaluations
            ],
            "training": [asdict(point) for point in self.training],
        }

    def _print(self, evaluations: Sequence[Evaluation], title: str) -> None:
        if self.table:
            console = Console()
            # A pipe has no width of its own, and a table cut to 80 columns loses its last ones.
            if not console.is_terminal:
                console = Console(width=max(console.width, 110))
            console.print(comparison(evaluations, title, self.confidence))


def comparison(evaluations: Sequence[Evaluation], title: str, confidence: float = 0.95) -> Table:
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

    def cells(counts: Sequence[tuple[int, int]]) -> list[str]:
        texts = []
        for successes, episodes in counts:
            low, high = wilson(successes, episodes, confidence)
            rate = f"{successes / episodes:.1%} [{low:.1%}, {high:.1%}]" if episodes else "–"
            texts += [rate, str(episodes)]
        if len(counts) == 2:
            (won, played), (won_later, played_later) = counts
            if played and played_later:
                low, high = newcombe(counts[0], counts[1], confidence)
                texts.append(
                    f"{100 * (won_later / played_later - won / played):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
                )
            else:
                texts.append("–")
        return texts

    kinds = sorted(reduce(add, (Counter(evaluation.kinds.keys()) for evaluation in evaluations)))
    if len(kinds) > 1:
        for kind in kinds:
            table.add_row(kind or "(none)", *cells([evaluation.kinds.get(kind, (0, 0)) for evaluation in evaluations]))
        table.add_section()
    table.add_row("all", *cells([(e.successes, e.episodes) for e in evaluations]), style="bold")
    return table

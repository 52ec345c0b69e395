"""The report of ``validate`` and ``test``: a table for people, JSON for programs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.table import Table

from spear_lightning.callbacks.logs import completed_iterations, print_table
from spear_lightning.environments.mixture import belongs, with_families
from spear_lightning.metrics.evaluation import Estimate, EvaluationSummary, Results, summarize
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.utils.atomic import write_atomically
from spear_lightning.utils.ranges import Confidence, in_range

_SPLITS = {TrainerFn.VALIDATING: "validation", TrainerFn.TESTING: "test"}


@in_range
class EvaluationReport(Callback, RolloutHooks):
    """Reports success, score and effort on held-out tasks, overall and by task type, the way papers do.

    Active in ``validate`` and ``test``, where it prints a table and writes ``validation.json`` or ``test.json``:
    success rate (avg@k where ``data.evaluation.episodes_per_task`` is k), pass@k, maj@k for tasks that ask for an
    answer, score, turns, tokens, tool calls and the share of invalid turns. Intervals are bootstrapped over tasks.
    ``spear`` adds it to every run.

    Args:
        directory: where to write; ``None`` for the run directory.
        confidence: two-sided coverage of the intervals.

    Raises:
        ValueError: ``confidence`` is not in (0, 1).

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import EvaluationReport
        >>> report = EvaluationReport(directory="runs/example", confidence=0.9)
        >>> trainer = Trainer(callbacks=[report], logger=False, enable_checkpointing=False)
        >>> report.summaries
        {}
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, confidence: Confidence = 0.95) -> None:
        super().__init__()
        self.directory = None if directory is None else Path(directory)
        self.confidence = confidence
        self.summaries: dict[str, EvaluationSummary] = {}
        self._results = Results()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget what an interrupted evaluation has left."""
        self._results = Results()

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Take the episodes of a part of the evaluation."""
        if trainer.state.fn in _SPLITS:
            self._results.add(rollout)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report, unless it is the validation of a training run."""
        if trainer.state.fn not in _SPLITS:
            return
        split = _SPLITS[trainer.state.fn]
        results, self._results = self._results.over_ranks(), Results()
        records, aborted = results.records, results.aborted
        if not records:
            return
        types = with_families([record.task_type for record in records])
        self.summaries = {"all": summarize(records, self.confidence)} | {
            name: summarize([record for record in records if belongs(record.task_type, name)], self.confidence)
            for name in (types if len(types) > 1 else ())
        }
        if not trainer.is_global_zero:
            return
        everything, *by_type = self.summaries.items()
        content = {
            "split": split,
            "checkpoint": None if trainer.ckpt_path is None else os.fspath(trainer.ckpt_path),
            "iteration": completed_iterations(trainer),
            "confidence": self.confidence,
            "aborted": aborted,
            **asdict(everything[1]),
            "by_task_type": {kind: asdict(summary) for kind, summary in by_type},
        }
        folder = self.directory or Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{split}.json", json.dumps(content, indent=2) + "\n")
        print_table(report_table(self.summaries, f"{split} ({self.confidence:.0%} intervals)", aborted), 150)

    on_test_end = on_validation_end


def report_table(summaries: dict[str, EvaluationSummary], title: str, aborted: int) -> Table:
    """Summaries as a table, the last row for all tasks.

    Args:
        summaries: by task type; ``"all"`` first.
        title: above the table.
        aborted: episodes whose environment failed.
    """
    whole = summaries["all"]
    k = whole.attempts
    table = Table(title=title, title_justify="left", caption=f"{aborted} episodes aborted" if aborted else None)
    table.add_column("task type")
    columns = ["tasks", "success" if k == 1 else f"avg@{k}", *(f"pass@{number}" for number in whole.pass_at)]
    if whole.majority is not None:
        columns.append(f"maj@{k}")
    for name in (*columns, "score", "turns", "tokens", "tool calls", "invalid"):
        table.add_column(name, justify="right")
    for name, summary in [*list(summaries.items())[1:], ("all", whole)]:
        rates = [summary.success, *(summary.pass_at.get(number) for number in whole.pass_at)]
        rates += [] if whole.majority is None else [summary.majority]
        score = summary.score
        cells = [str(summary.tasks), *map(_rate, rates), f"{score.mean:.3f} [{score.low:.3f}, {score.high:.3f}]"]
        cells += [f"{summary.turns:.1f}", f"{summary.tokens:.0f}", f"{summary.tool_calls:.1f}"]
        cells.append(f"{summary.invalid:.1%}")
        if name == "all" and len(summaries) > 1:
            table.add_section()
        table.add_row(name or "(none)", *cells, style="bold" if name == "all" else None)
    return table


def _rate(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.mean:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"

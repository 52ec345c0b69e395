"""A CSV of all metrics, one row per iteration, that stays right when a run is resumed."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from spear_lightning.utils.atomic import write_atomically


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: one row per iteration, one column per metric.

    What is logged for the same iteration (training, validation, callbacks) goes into the same row. A resumed run keeps
    the rows before the iteration it resumes at and writes the others anew, so the file reads as if the run had never
    been interrupted; Lightning's own ``CSVLogger`` starts over.

    Args:
        directory: folder of the file.

    Example::

        >>> import tempfile
        >>> logger = MetricsCSV(tempfile.mkdtemp())
        >>> logger.log_metrics({"rollout/success": 0.25}, step=0)
        >>> logger.log_metrics({"rollout/success": 0.5, "validation/success": 0.4}, step=1)
        >>> print(logger.path.read_text().strip())
        iteration,rollout/success,validation/success
        0,0.25,
        1,0.5,0.4
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._rows: dict[int, dict[str, str]] = {}
        self._started = False

    @property
    def name(self) -> str:
        """Empty: the file lies in the run directory itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file lies in the run directory itself."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's configuration is saved as ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Merge ``metrics`` into the row of iteration ``step`` and write the file."""
        iteration = int(step or 0)
        if not self._started:
            self._rows = {number: row for number, row in self._read().items() if number < iteration}
            self._started = True
        row = self._rows.setdefault(iteration, {})
        row.update({name: repr(float(value)) for name, value in metrics.items() if name != "epoch"})
        columns = sorted({name for values in self._rows.values() for name in values})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["iteration", *columns])
        writer.writeheader()
        writer.writerows({"iteration": number, **values} for number, values in sorted(self._rows.items()))
        write_atomically(self.path, text.getvalue())

    def _read(self) -> dict[int, dict[str, str]]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            rows = {int(row.pop("iteration")): row for row in csv.DictReader(file)}
        return {number: {name: value for name, value in row.items() if value} for number, row in rows.items()}

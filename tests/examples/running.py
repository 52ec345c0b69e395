"""``spear`` as examples call it: with a folder of a user's own modules on the Python path."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.processes import spear, start_ranks

ROOT = Path(__file__).resolve().parents[2]


def fit(modules: Path, arguments: Sequence[str], changes: Mapping[str, object], folder: Path) -> list[dict[str, float]]:
    """Train, and return the metrics of each iteration.

    Args:
        modules: what is on the Python path.
        arguments: as on the command line, without ``spear``.
        changes: further settings, which win.
        folder: that the run writes to.
    """
    settings = {"run.directory": str(folder), "trainer.num_sanity_val_steps": 0, **changes}
    keys = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    ranks = start_ranks(1, call, str(modules), spear, [*arguments, *keys], folder=folder.parent / "printed")
    assert ranks.join() == [0], ranks.printed()
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def call(modules: str, function: Any, argument: Any) -> None:
    """Call a function as a process would that was started in the project's folder with a ``PYTHONPATH``."""
    os.chdir(ROOT)
    sys.path.insert(0, modules)
    function(argument)


def episodes(folder: Path) -> list[dict[str, Any]]:
    """The training episodes that a run has written down."""
    files = sorted((folder / "rollouts" / "train").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]

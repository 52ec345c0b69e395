"""Whole iterations of ``spear fit`` under two recipes that play the same episodes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

SAME_ROLLOUTS: dict[str, Any] = {
    # Weights stand still to rounding, so both recipes play the same episodes in every iteration. What a step costs does
    # not depend on its length.
    "model.optimizer.init_args.lr": 1e-12,
    "trainer.num_sanity_val_steps": 0,
    "trainer.check_val_every_n_epoch": 1000,
    "trainer.logger": None,
    "trainer.callbacks+": "spear_lightning.callbacks.ThroughputMonitor",  # logs whole iterations
}


def run(arm: str, iterations: int, folder: Path, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Train with ``configs/quickstart.yaml`` and an arm of the comparison; a row of metrics for each iteration.

    Args:
        arm: file in ``benchmarks/arms``, without its ending.
        iterations: how many.
        folder: of the run; made.
        changes: configuration keys over those of the arm.
    """
    settings = {**SAME_ROLLOUTS, "trainer.max_epochs": iterations, "run.directory": str(folder), **changes}
    keys = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
        if value is not None
    ]
    subprocess.run(
        [
            *(sys.executable, "-m", "spear_lightning.cli.main", "fit", "-c", "configs/quickstart.yaml"),
            *("-c", f"benchmarks/arms/{arm}.yaml", *keys),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
        text=True,
    )
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if _is_number(value)} for row in rows]


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True

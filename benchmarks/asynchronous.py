"""Seconds of an iteration: the next rollout played after the update, and while it runs.

    python benchmarks/asynchronous.py --out benchmarks/asynchronous.json

``spear fit -c configs/quickstart.yaml`` is run in turn with ``data.rollouts.max_staleness`` 0 and 1. The learning rate
is so small that no weight changes, so both play the same episodes and make the same updates in every iteration; the
first iteration and the last, which plays nothing ahead, are left out. Told are the medians of each pair of runs, their
ratio (above 1: playing ahead is faster), and the same again for the phases, whose sum is longer than the iteration
where they overlap.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparison.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("iteration", "rollout", "training", "rollout_generation", "rollout_environment", "rollout_sync")
MONITOR = "[{class_path: spear_lightning.callbacks.ThroughputMonitor}]"


def run(staleness: int, iterations: int, tasks: int, folder: Path, games: Path) -> dict[str, float]:
    """Median seconds by phase of one run."""
    directory = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        "run.directory": directory,
        "data.rollouts.max_staleness": staleness,
        "data.rollouts.tasks": tasks,
        "data.environment.train": tasks * iterations,
        "data.environment.validation": 1,
        "data.environment.test": 1,
        "data.environment.cache_dir": games,
        "model.optimizer.init_args.lr": 1e-12,
        "trainer.max_epochs": iterations,
        "trainer.num_sanity_val_steps": 0,
        "trainer.limit_val_batches": 0,
        "trainer.callbacks": MONITOR,
    }
    command = [sys.executable, "-m", "spear_lightning.cli.main", "fit", "-c", "configs/quickstart.yaml"]
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in settings.items())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"spear fit failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[1:-1]
    return {phase: statistics.median(float(row[f"time/{phase}"]) for row in rows) for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one pair of short runs")
    parser.add_argument("--pairs", type=int, default=5, help="of runs")
    parser.add_argument("--iterations", type=int, default=12, help="of a run")
    parser.add_argument("--tasks", type=int, default=16, help="of an iteration, eight episodes each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.quick:
        options.pairs, options.iterations, options.tasks = 1, 5, 4
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(options.pairs):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            found = {
                staleness: run(staleness, options.iterations, options.tasks, folder, folder / "games")
                for staleness in order
            }
            pairs.append((found[0], found[1]))
            print(
                f"pair {number + 1}: {found[0]['iteration']:.2f} s on-policy, {found[1]['iteration']:.2f} s ahead, "
                f"{found[0]['iteration'] / found[1]['iteration']:.2f} times as fast",
                flush=True,
            )
    report: dict[str, Any] = {
        "settings": {
            "iterations": options.iterations,
            "tasks": options.tasks,
            "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "seconds": {
            name: {phase: [pair[which][phase] for pair in pairs] for phase in PHASES}
            for which, name in enumerate(("max_staleness 0", "max_staleness 1"))
        },
    }
    ratios = [before["iteration"] / after["iteration"] for before, after in pairs]
    report["speed-up"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    report |= provenance(1, ROOT)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["speed-up"]))


if __name__ == "__main__":
    main()

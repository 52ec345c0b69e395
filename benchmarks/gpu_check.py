"""Whether all of it runs on a GPU, with the same numbers.

On any machine with one::

    python benchmarks/gpu_check.py --out gpu_check.json     # --only PART …, --jobs N side by side

Each part is a process (or some) of its own, so one that fails leaves the others alone. Parts that run
side by side slow each other down: their seconds mean nothing.

* ``head``, ``engine``, ``layouts``: the same numbers (``benchmarks/measuring/gpu_numbers.py``);
* ``float32``, ``bfloat16``: ``spear fit -c configs/quickstart.yaml`` on the GPU, against the same on the CPU (``cpu``);
* ``single``, ``zero2``, ``zero3``, ``zero2-bfloat16``: three iterations, and again with an end and a resume after two;
* ``ahead``: the next rollout is played while one trains, on a stream of its own; ``compile``: ``policy.compile``;
* ``times-28M``, ``times-0.5B``: an update by layout and precision, alone on the machine
  (``benchmarks/measuring/gpu_layouts.py``);
* ``large``: an iteration of a 0.5B model with random weights: what ``ThroughputMonitor`` says.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison.provenance import provenance
from measuring.gpu_layouts import MODELS

from spear_lightning.utils.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
GPU = ("--trainer.accelerator", "gpu")
NO_VALIDATION = ("--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0")
MONITOR = {"class_path": "spear_lightning.callbacks.ThroughputMonitor"}
CHECKPOINT = {"class_path": "ShardedCheckpoint", "init_args": {"every_n_iterations": 1}}
COLUMNS = (
    *("rollout/success", "rollout/entropy", "rollout/logp_mismatch", "rollout/logp_mismatch_max", "rollout/staleness"),
    *("update/entropy", "update/grad_norm", "update/loss", "replay/used", "time/mfu", "time/iteration"),
    *("time/rollout", "time/training"),
)


class PartFailedError(Exception):
    """A process of a part has failed; its last lines."""


@dataclass(frozen=True)
class Machine:
    """Where parts run.

    Attributes:
        folder: for everything they write; shared by all.
        timeout: seconds for each process.
        rounds: of the timings.
    """

    folder: Path
    timeout: int
    rounds: int

    def call(self, *command: str) -> str:
        """What a Python process prints.

        Raises:
            PartFailedError: it fails, or takes too long.
        """
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=self.timeout
            )
        except subprocess.TimeoutExpired as error:
            raise PartFailedError(f"took longer than {self.timeout} s: {(error.stderr or b'')[-1500:]!r}") from error
        if done.returncode:
            raise PartFailedError(f"{done.stdout[-1000:]}\n{done.stderr[-3500:]}")
        return done.stdout

    def fit(self, name: str, iterations: int, *settings: str) -> list[dict[str, float]]:
        """Rows of ``metrics.csv`` of a run of the quickstart on few games."""
        directory = self.folder / name
        overlay = self.folder / f"{name}.yaml"
        write_atomically(overlay, json.dumps({"trainer": {"callbacks+": [MONITOR, CHECKPOINT]}}))  # JSON is YAML
        self.call(
            *("-m", "spear_lightning.cli.main", "fit", "-c", "configs/quickstart.yaml", "-c", str(overlay)),
            *("--run.directory", str(directory)),
            *("--trainer.max_epochs", str(iterations), "--model.correction.recompute", "true"),
            *("--data.environment.train", "64", "--data.environment.validation", "32"),
            *("--data.environment.test", "8", "--data.environment.cache_dir", str(self.folder / "games"), *settings),
        )
        with (directory / "metrics.csv").open(encoding="utf-8") as file:
            return [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)]


def numbers(part: str) -> Callable[[Machine], Any]:
    return lambda machine: json.loads(machine.call("benchmarks/measuring/gpu_numbers.py", part))


def times(model: str) -> Callable[[Machine], Any]:
    def measure(machine: Machine) -> Any:
        script = "benchmarks/measuring/gpu_layouts.py"
        return {
            precision: json.loads(machine.call(script, model, precision, str(machine.rounds)).splitlines()[-1])
            for precision in ("32-true", "bf16-true")
        }

    return measure


def fit(name: str, iterations: int, *settings: str) -> Callable[[Machine], Any]:
    def run(machine: Machine) -> Any:
        return [_chosen(row) for row in machine.fit(name, iterations, *settings)]

    return run


def resumed(name: str, *settings: str) -> Callable[[Machine], Any]:
    """Three iterations at once; the same again; and two, an end, and the third."""

    def run(machine: Machine) -> Any:
        common = (*GPU, *NO_VALIDATION, *settings)
        whole = machine.fit(f"{name}-whole", 3, *common)
        again = machine.fit(f"{name}-again", 3, *common)
        machine.fit(f"{name}-parts", 2, *common)
        parts = machine.fit(f"{name}-parts", 3, *common, "--ckpt_path", "last")
        return {
            "rows": [_chosen(row) for row in whole],
            "again, largest relative differences": [_difference(*pair) for pair in zip(whole, again, strict=True)],
            "resumed, largest relative differences": [_difference(*pair) for pair in zip(whole, parts, strict=True)],
        }

    return run


def _chosen(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in COLUMNS if name in row}


def _difference(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Where two rows differ, by how much; times aside."""
    timed = ("time/", "per_second")
    found = {}
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name, float("nan")), other.get(name, float("nan"))
        if a != b and not any(word in name for word in timed):
            found[name] = abs(a - b) / max(abs(a), abs(b))
    return dict(sorted(found.items(), key=lambda item: -item[1])[:5])


SIDE_BY_SIDE: dict[str, Callable[[Machine], Any]] = {
    "float32": fit("float32", 4, *GPU, "--trainer.check_val_every_n_epoch", "4"),
    "bfloat16": fit("bfloat16", 4, *GPU, *NO_VALIDATION, "--trainer.precision", "bf16-true"),
    "head": numbers("head"),
    "engine": numbers("engine"),
    "layouts": numbers("layouts"),
    "zero2": resumed("zero2", "-c", "configs/strategy/zero2.yaml"),
    "zero3": resumed("zero3", "-c", "configs/strategy/zero3.yaml"),
    "ahead": fit("ahead", 4, *GPU, *NO_VALIDATION, "--data.rollouts.max_staleness", "1"),
    "compile": fit("compile", 2, *GPU, *NO_VALIDATION, "--model.policy.compile", "true"),
    "single": resumed("single"),
    "shared-bfloat16": fit(
        *("shared-bfloat16", 3, *GPU, *NO_VALIDATION),
        *("--trainer.precision", "bf16-true", "--model.policy.layout", "shared"),
    ),
    "zero2-bfloat16": resumed("zero2-bf16", "-c", "configs/strategy/zero2.yaml", "--trainer.precision", "bf16-true"),
}
ALONE: dict[str, Callable[[Machine], Any]] = {
    "times-28M": times("28M"),
    "times-0.5B": times("0.5B"),
    "large": fit(
        *("large", 2, *GPU, *NO_VALIDATION, "--trainer.precision", "bf16-true"),
        *("--model.policy.model", "null", "--model.policy.config", json.dumps(MODELS["0.5B"])),
        *("--model.policy.tokenizer", "spear_lightning/policy/embedded", "--model.policy.layout", "packed"),
    ),
    "cpu": fit("cpu", 4, "--trainer.check_val_every_n_epoch", "4"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, print each as it is done, write JSON.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parts = SIDE_BY_SIDE | ALONE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help="some parts")
    parser.add_argument("--jobs", type=int, default=4, help="parts side by side, the timings aside")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each process")
    parser.add_argument("--rounds", type=int, default=7, help="of the timings")
    parser.add_argument("--folder", type=Path, help="to work in; kept")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and given.only != ["cpu"]:
        parser.error("torch sees no GPU")
    record: dict[str, Any] = provenance(given.jobs, ROOT) | {"parts": {}, "failed": {}}
    if torch.cuda.is_available():
        record["GPU"] = torch.cuda.get_device_name()
        record["CUDA"] = torch.version.cuda
    with tempfile.TemporaryDirectory() as place:
        machine = Machine((given.folder or Path(place)).resolve(), given.timeout, given.rounds)

        def do(name: str) -> None:
            started = time.perf_counter()
            try:
                record["parts"][name] = parts[name](machine)
                told = json.dumps(record["parts"][name])
            except PartFailedError as error:
                record["failed"][name] = str(error)
                told = f"FAILED\n{error}"
            print(f"--- {name}, {time.perf_counter() - started:.0f} s: {told}", flush=True)
            if given.out:
                write_atomically(given.out, json.dumps(record, indent=1) + "\n")

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(do, [name for name in given.only if name in SIDE_BY_SIDE]))
        for name in given.only:
            if name in ALONE:
                do(name)
    print(f"{len(record['parts'])} parts ran, {len(record['failed'])} failed: {', '.join(record['failed']) or 'none'}")
    sys.exit(1 if record["failed"] else 0)


if __name__ == "__main__":
    main()

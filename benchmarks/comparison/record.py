"""What is kept of a run: one small JSON file, read from what the run itself has written."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spear_lightning.utils.atomic import write_atomically

# Curves taken from a run's metrics.csv, by their name in the record.
TRAINING_CURVES = {
    "success": "rollout/success",
    "reward": "reward/total",
    "entropy": "rollout/entropy",
    "invalid": "rollout/invalid",
    "turns": "rollout/turns",
    "grad_norm": "update/grad_norm",
    "approx_kl": "update/approx_kl",
    "cov_fraction": "update/cov_fraction",
    "replay_cov_fraction": "replay/cov_fraction",
    "replay_entropy": "replay/entropy",
    "p50": "replay/p50",
    "imitation_weight": "curriculum/imitation_weight",
    "tool_reward_weight": "curriculum/tool_reward_weight",
    "replayed": "replay/used",
    "replay_age": "replay/age",
    "recalibrated_advantage": "advantage/recalibrated",
    "fresh_tokens": "update/tokens",
    "replayed_tokens": "replay/tokens",
}

# Wall-clock of the phases of an iteration. Evaluation and checkpoints are no part of training time.
PHASES = {
    "generation": "time/rollout_generation",
    "environment": "time/rollout_environment",
    "other": "time/rollout_other",
    "update": "time/update",
}

Row = dict[str, float]


class IncompleteRunError(Exception):
    """A run directory lacks what a record needs; the message names the file."""


@dataclass(frozen=True)
class CurvePoint:
    """Held-out success at one point of a run.

    Attributes:
        iteration: iterations done before it.
        seconds: training time until then, without evaluations.
        successes: episodes that succeeded.
        episodes: played.
    """

    iteration: int
    seconds: float
    successes: int
    episodes: int

    @property
    def success(self) -> float:
        """Share of episodes that succeeded."""
        return self.successes / self.episodes


@dataclass(frozen=True)
class TestResult:
    """Success of the final policy on the fresh test games.

    Attributes:
        successes: episodes that succeeded.
        episodes: played.
        aborted: episodes whose environment failed; not among ``episodes``.
        invalid: share of turns without the required form, ``None`` where unknown.
    """

    __test__ = False  # not a pytest class

    successes: int
    episodes: int
    aborted: int = 0
    invalid: float | None = None

    @property
    def success(self) -> float:
        """Share of episodes that succeeded."""
        return self.successes / self.episodes


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        arm: name of the arm.
        seed: of the run.
        digest: of the composed configuration and the test temperatures.
        iterations: done.
        curve: held-out success, by iteration.
        training: per iteration, by name (:data:`TRAINING_CURVES`); ``None`` where the run logged nothing.
        tests: by sampling temperature.
        seconds: wall-clock by phase (:data:`PHASES`), and their sum as ``training``.
        provenance: versions, machine, commit.
    """

    arm: str
    seed: int
    digest: str
    iterations: int
    curve: list[CurvePoint]
    training: dict[str, list[float | None]]
    tests: dict[str, TestResult]
    seconds: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> CurvePoint | None:
        """The policy before training, if it was evaluated."""
        return self.curve[0] if self.curve[0].iteration == 0 else None

    @property
    def after(self) -> CurvePoint:
        """The last evaluation."""
        return self.curve[-1]

    @property
    def replay(self) -> dict[str, float]:
        """Use of the replay buffer: episodes replayed, iterations that replayed any, share of trained tokens."""
        replayed = [value or 0.0 for value in self.training.get("replayed", [])]
        tokens = {
            name: sum(v or 0.0 for v in self.training.get(name, [])) for name in ("fresh_tokens", "replayed_tokens")
        }
        everything = sum(tokens.values())
        return {
            "episodes": sum(replayed),
            "iterations": sum(value > 0 for value in replayed),
            "token_share": tokens["replayed_tokens"] / everything if everything else 0.0,
        }

    def to_json(self) -> str:
        """As written to disk; what follows from the rest is written out for readers of the file."""

        def rate(counts: CurvePoint | TestResult | None) -> dict[str, Any] | None:
            return None if counts is None else {**asdict(counts), "success": counts.success}

        values = {
            "arm": self.arm,
            "seed": self.seed,
            "status": "finished",
            "digest": self.digest,
            "iterations": self.iterations,
            "validation": {"before": rate(self.before), "after": rate(self.after)},
            "test": {temperature: rate(result) for temperature, result in self.tests.items()},
            "replay": self.replay,
            "seconds": self.seconds,
            "provenance": self.provenance,
            "curve": [rate(point) for point in self.curve],
            "training": self.training,
        }
        return compact_json(values)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunRecord:
        """The record that :meth:`to_json` wrote.

        Raises:
            KeyError: ``values`` is not one.
        """

        def counts(entry: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in entry.items() if name != "success"}

        return cls(
            arm=values["arm"],
            seed=values["seed"],
            digest=values["digest"],
            iterations=values["iterations"],
            curve=[CurvePoint(**counts(point)) for point in values["curve"]],
            training=values["training"],
            tests={temperature: TestResult(**counts(entry)) for temperature, entry in values["test"].items()},
            seconds=values["seconds"],
            provenance=values["provenance"],
        )


def read_run(
    directory: Path, tests: dict[str, Path], *, arm: str, seed: int, digest: str, provenance: dict[str, Any]
) -> RunRecord:
    """The record of a run that has been trained and tested.

    Args:
        directory: of ``spear fit``: ``metrics.csv`` and ``evaluations.json``.
        tests: directory of ``spear test`` by temperature.
        arm: name of the arm.
        seed: of the run.
        digest: of its configuration.
        provenance: versions, machine, commit.

    Raises:
        IncompleteRunError: a file is missing or lacks what is needed.
    """
    rows = _training_rows(directory / "metrics.csv")
    phases = {name: [row.get(column, 0.0) for row in rows] for name, column in PHASES.items()}
    elapsed = [0.0]
    for durations in zip(*phases.values(), strict=True):
        elapsed.append(elapsed[-1] + sum(durations))
    curve = [
        CurvePoint(iteration, round(elapsed[min(iteration, len(rows))], 3), successes, episodes)
        for iteration, successes, episodes in read_evaluations(directory)
    ]
    if not curve:
        raise IncompleteRunError(f"{directory / 'evaluations.json'} has no evaluation")
    training = {name: [_rounded(row.get(column)) for row in rows] for name, column in TRAINING_CURVES.items()}
    return RunRecord(
        arm=arm,
        seed=seed,
        digest=digest,
        iterations=len(rows),
        curve=curve,
        training={name: values for name, values in training.items() if any(value is not None for value in values)},
        tests={temperature: _read_test(folder) for temperature, folder in tests.items()},
        seconds={name: round(sum(values), 3) for name, values in phases.items()} | {"training": round(elapsed[-1], 3)},
        provenance=provenance,
    )


def read_evaluations(directory: Path) -> list[tuple[int, int, int]]:
    """``(iterations done, successes, episodes)`` of each evaluation so far, in order; empty before the first.

    Args:
        directory: of a run with the ``LearningCurve`` callback.
    """
    try:
        report = json.loads((directory / "evaluations.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    return [(entry["iteration"], entry["successes"], entry["episodes"]) for entry in report["evaluations"]]


def _training_rows(path: Path) -> list[Row]:
    rows = [row for _, row in sorted(_rows(path).items()) if "rollout/success" in row]
    if not rows:
        raise IncompleteRunError(f"{path} has no training iteration")
    return rows


def _read_test(directory: Path) -> TestResult:
    path = directory / "metrics.csv"
    rows = [row for row in _rows(path).values() if "test/success" in row]
    if not rows:
        raise IncompleteRunError(f"{path} has no test result")
    row = rows[-1]
    episodes = round(row["test/episodes"])
    return TestResult(
        successes=round(row["test/success"] * episodes),
        episodes=episodes,
        aborted=round(row.get("test/aborted", 0.0)),
        invalid=_rounded(row.get("test/invalid")),
    )


def _rows(path: Path) -> dict[int, Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except FileNotFoundError:
        raise IncompleteRunError(f"{path} is missing") from None
    return {int(line.pop("iteration")): {name: float(value) for name, value in line.items() if value} for line in lines}


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FailedRun:
    """A run that did not come to its end.

    Attributes:
        arm: name of the arm.
        seed: of the run.
        digest: of its configuration.
        error: what failed.
        log: last lines of what it printed.
    """

    arm: str
    seed: int
    digest: str
    error: str
    log: list[str]

    def to_json(self) -> str:
        """As written to disk."""
        return compact_json({"status": "failed", **asdict(self)})


def load_records(folder: Path) -> list[RunRecord]:
    """All finished runs whose records lie in ``folder``, by arm and seed."""
    found = [load_record(path) for path in sorted(folder.glob("*-seed*.json"))]
    return sorted((record for record in found if record is not None), key=lambda record: (record.arm, record.seed))


def load_record(path: Path) -> RunRecord | None:
    """The finished run recorded in a file; ``None`` if it is missing, damaged or records a failure."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord.from_json(values) if values["status"] == "finished" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(path: Path, record: RunRecord | FailedRun) -> None:
    """Write a record, whole or not at all."""
    write_atomically(path, record.to_json())


def compact_json(values: Any) -> str:
    """Strict JSON, indented, but with whatever holds no further container on one line: small, and diffs well."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    strings = re.compile(r'"(?:[^"\\]|\\.)*"')
    # Only brackets outside strings count; a string takes part as a whole.
    flat = re.compile(rf"([\[{{])\n((?:{strings.pattern}|[^\[\]{{}}\"])*)\n\s*([\]}}])")
    return flat.sub(lambda found: found[1] + re.sub(r"\n\s*", " ", found[2].strip()) + found[3], text) + "\n"

"""The outcome of a comparison as data (summary.json) and as tables (summary.md)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comparison.aggregation import Horizon, Measure, Spread, by_arm, measures, over_seeds, paired
from comparison.record import FailedRun, RunRecord

_MINUS = "−"


@dataclass(frozen=True)
class Summary:
    """Everything that the tables and the picture show.

    Attributes:
        runs: finished runs by arm, in the order of the arms.
        failed: runs that did not finish.
        temperatures: of the tests, the main one first.
        baselines: by arm, the arm it is compared with.
        differing: settings in which the arms differ, by key and arm.
    """

    runs: Mapping[str, Sequence[RunRecord]]
    failed: Sequence[FailedRun]
    temperatures: Sequence[str]
    baselines: Mapping[str, str]
    differing: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        records: Sequence[RunRecord],
        failed: Sequence[FailedRun],
        arms: Sequence[str],
        temperatures: Sequence[str],
        baselines: Mapping[str, str],
        differing: Mapping[str, Mapping[str, Any]],
    ) -> Summary:
        """Summarise at least one finished run.

        Args:
            records: finished runs.
            failed: those that did not finish.
            arms: names in the order they are shown in.
            temperatures: of the tests, the main one first.
            baselines: by arm, the arm it is compared with.
            differing: settings in which the arms differ, by key and arm.
        """
        return cls(by_arm(records, arms), failed, temperatures, baselines, differing)

    @property
    def records(self) -> list[RunRecord]:
        """All finished runs."""
        return [run for runs in self.runs.values() for run in runs]

    @property
    def horizon(self) -> Horizon:
        """What every run has reached."""
        return Horizon.of(self.records)

    @property
    def measures(self) -> Mapping[str, Measure]:
        """What is measured of a run."""
        return measures(self.temperatures)

    def arm(self, name: str) -> dict[str, Spread | None]:
        """Every measure of one arm over its seeds."""
        return {title: over_seeds(self.runs[name], measure, self.horizon) for title, measure in self.measures.items()}

    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs of an arm and its baseline of which there are runs."""
        return [(arm, other) for arm, other in self.baselines.items() if arm in self.runs and other in self.runs]

    def difference(self, arm: str, baseline: str, measure: str) -> tuple[dict[int, float], Spread | None]:
        """The difference of two arms in one measure: by seed, and over seeds."""
        return paired(self.runs[arm], self.runs[baseline], self.measures[measure], self.horizon)


def summary_json(summary: Summary) -> str:
    """The content of summary.json."""

    def plain(value: Spread | None) -> dict[str, Any] | None:
        return None if value is None else asdict(value)

    differences: dict[str, dict[str, Any]] = {}
    for arm, baseline in summary.comparisons():
        entry = differences[f"{arm} vs {baseline}"] = {}
        for title in summary.measures:
            by_seed, over = summary.difference(arm, baseline, title)
            entry[title] = {"by_seed": {str(seed): value for seed, value in by_seed.items()}, "spread": plain(over)}
    values = {
        "horizon": asdict(summary.horizon),
        "arms": {
            name: {
                "seeds": [run.seed for run in runs],
                "measures": {title: plain(value) for title, value in summary.arm(name).items()},
                "training_seconds": plain(_mean_of(runs, "training")),
            }
            for name, runs in summary.runs.items()
        },
        "differences": differences,
        "failed": [{"arm": run.arm, "seed": run.seed, "error": run.error} for run in summary.failed],
        "differing_settings": {key: dict(of_arm) for key, of_arm in summary.differing.items()},
        "commits": _distinct(summary, "commit"),
        "machines": _distinct(summary, "machine"),
    }
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def summary_markdown(summary: Summary) -> str:
    """The content of summary.md."""
    horizon = summary.horizon
    games = sorted({test.episodes for run in summary.records for test in run.tests.values()})
    parts = [
        "# Comparison",
        "",
        "Success in %: mean ± standard deviation over seeds [95 % t-interval of the mean]. The area under the "
        f"validation curve is its mean height up to iteration {horizon.iterations}, which every run has reached. Equal "
        f"wall-clock is {horizon.seconds:.0f} s of training (without evaluations), the smallest of all runs, read off "
        f"the validation curve by interpolation. Test: {' or '.join(map(str, games))} fresh games a run.",
        "",
        *_main_table(summary),
    ]
    if summary.comparisons():
        parts += [
            "",
            "## Differences to the baseline, paired by seed",
            "",
            "In percentage points. Intervals are of single comparisons, not corrected for their number.",
            "",
            *_difference_table(summary),
        ]
    parts += ["", "## Training", "", *_training_table(summary), "", "## Runs", "", *_run_table(summary)]
    if summary.failed:
        parts += ["", "## Failed runs", "", *(f"- {run.arm}, seed {run.seed}: {run.error}" for run in summary.failed)]
    if summary.differing:
        parts += ["", "## Settings that differ", "", *_settings_table(summary)]
    parts += ["", "## Provenance", "", *_provenance(summary)]
    return "\n".join(parts) + "\n"


def _main_table(summary: Summary) -> list[str]:
    rows = []
    for name, runs in summary.runs.items():
        cells = [_percent(value) for value in summary.arm(name).values()]
        rows.append([name, str(len(runs)), *cells])
    return _table(["arm", "seeds", *summary.measures], rows)


def _difference_table(summary: Summary) -> list[str]:
    titles = [title for title in summary.measures if title != "validation before"]
    rows = []
    for arm, baseline in summary.comparisons():
        found = {title: summary.difference(arm, baseline, title) for title in titles}
        cells = [_percent(over, signed=True) for _, over in found.values()]
        main = found.get(f"test, T = {summary.temperatures[0]}", ({}, None))[0]
        by_seed = ", ".join(f"{seed}: {_number(100 * value, signed=True)}" for seed, value in main.items())
        rows.append([f"{arm} {_MINUS} {baseline}", *cells, by_seed or "–"])
    return _table(["arms", *titles, f"test, T = {summary.temperatures[0]}, by seed"], rows)


def _training_table(summary: Summary) -> list[str]:
    rows = []
    for name, runs in summary.runs.items():
        entropies = [_ends(run.training.get("entropy", [])) for run in runs]
        phases = {phase: _mean_of(runs, phase) for phase in ("generation", "environment", "update", "training")}
        rows.append(
            [
                name,
                _range([run.iterations for run in runs]),
                " → ".join(_average([pair[end] for pair in entropies], 2) for end in (0, 1)),
                _average([run.replay["iterations"] for run in runs], 1),
                _average([run.replay["episodes"] for run in runs], 0),
                _average([100 * run.replay["token_share"] for run in runs], 1),
                *(f"{value.mean:.0f}" if value else "–" for value in phases.values()),
            ]
        )
    heads = [
        "arm",
        "iterations",
        "entropy (nats)",
        "iterations with replay",
        "episodes replayed",
        "% of tokens replayed",
    ]
    return _table([*heads, "generation s", "environment s", "update s", "training s"], rows)


def _run_table(summary: Summary) -> list[str]:
    def counts(result: Any) -> str:
        return f"{result.successes}/{result.episodes}" if result else "–"

    rows = [
        [
            name,
            str(run.seed),
            counts(run.before),
            counts(run.after),
            *(counts(run.tests.get(temperature)) for temperature in summary.temperatures),
            f"{run.seconds['training']:.0f}",
        ]
        for name, runs in summary.runs.items()
        for run in runs
    ]
    tests = [f"test, T = {temperature}" for temperature in summary.temperatures]
    return _table(["arm", "seed", "validation before", "validation after", *tests, "training s"], rows)


def _settings_table(summary: Summary) -> list[str]:
    arms = list(summary.runs)

    def shown(value: Any) -> str:
        return "–" if value is None else str(value).replace("|", "\\|")

    rows = [[f"`{key}`", *(shown(of_arm.get(arm)) for arm in arms)] for key, of_arm in summary.differing.items()]
    return _table(["setting", *arms], rows)


def _provenance(summary: Summary) -> list[str]:
    lines = [
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['jobs']} runs side by side"
        for machine in _distinct(summary, "machine")
    ]
    lines += [f"- commit {commit}" for commit in _distinct(summary, "commit")]
    for versions in _distinct(summary, "versions"):
        lines.append("- " + ", ".join(f"{name} {number}" for name, number in versions.items() if number))
    return lines


def _distinct(summary: Summary, key: str) -> list[Any]:
    found: dict[str, Any] = {}
    for run in summary.records:
        if run.provenance.get(key) is not None:
            found.setdefault(json.dumps(run.provenance[key], sort_keys=True), run.provenance[key])
    return list(found.values())


def _mean_of(runs: Sequence[RunRecord], phase: str) -> Spread | None:
    return over_seeds(runs, lambda run, _: run.seconds.get(phase), Horizon.of(runs))


def _ends(values: Sequence[float | None], width: int = 5) -> tuple[float | None, float | None]:
    """Mean of the first and of the last few known values of a curve."""
    known = [value for value in values if value is not None]
    return (statistics.fmean(known[:width]), statistics.fmean(known[-width:])) if known else (None, None)


# --- cells ------------------------------------------------------------------------------------------------------------


def _number(value: float, *, signed: bool = False) -> str:
    text = f"{value:+.1f}" if signed else f"{value:.1f}"
    return text.replace("-", _MINUS)


def _percent(value: Spread | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    text = _number(100 * value.mean, signed=signed)
    if value.sd is None or value.low is None or value.high is None:
        return text
    ends = ", ".join(_number(100 * end, signed=signed) for end in (value.low, value.high))
    return f"{text} ± {_number(100 * value.sd)} [{ends}]"


def _average(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else "–"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]

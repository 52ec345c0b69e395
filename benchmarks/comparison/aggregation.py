"""From runs to statements about arms: means over seeds with their uncertainty, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from comparison.record import CurvePoint, RunRecord


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds.

    Attributes:
        n: number of seeds.
        mean: over seeds.
        sd: sample standard deviation over seeds (n − 1); ``None`` for a single seed.
        low: lower end of the 95 % t-interval of the mean; ``None`` for a single seed.
        high: upper end.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def spread(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Mean, standard deviation and Student's t-interval of the mean.

    Args:
        values: one per seed, at least one.
        confidence: two-sided coverage of the interval.

    Example:
        >>> result = spread([1.0, 2.0, 3.0])
        >>> f"{result.mean:.1f} {result.sd:.1f} [{result.low:.2f}, {result.high:.2f}]"
        '2.0 1.0 [-0.48, 4.48]'
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Spread(1, mean, None, None, None)
    sd = statistics.stdev(values)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * sd / math.sqrt(len(values))
    return Spread(len(values), mean, sd, mean - half, mean + half)


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t distribution with a whole number of degrees of freedom.

    Args:
        p: in [0.5, 1).
        df: degrees of freedom, at least 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> f"{t_quantile(0.975, 4):.3f}"
        '2.776'
    """
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"t_quantile needs 0.5 <= p < 1 and df >= 1, not p={p}, df={df}")
    low, high = 0.0, 1.0
    while _t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):  # bisection down to neighbouring doubles
        middle = (low + high) / 2
        if _t_cdf(middle, df) < p:
            low = middle
        else:
            high = middle
    return high


def _t_cdf(t: float, df: int) -> float:
    """P(T <= t) for t >= 0: the finite sums of Abramowitz & Stegun 26.7.3 (odd df) and 26.7.4 (even df)."""
    theta = math.atan(t / math.sqrt(df))
    cosine = math.cos(theta)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 if df % 2 else 1, df, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if df % 2 else math.sin(theta) * total
    return 0.5 + inside / 2


# --- what is measured of one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Horizon:
    """What every run of a comparison has reached, so that curves are compared over the same stretch.

    Attributes:
        iterations: smallest last evaluation of all runs.
        seconds: smallest training time of all runs.
    """

    iterations: int
    seconds: float

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> Horizon:
        """Of at least one run."""
        return cls(
            iterations=min(record.after.iteration for record in records),
            seconds=min(record.after.seconds for record in records),
        )


def interpolate(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Piecewise linear through ``(x, y)``, constant beyond its ends.

    Args:
        x: ascending, at least one.
        y: as many.
        at: where to read it.
    """
    if at <= x[0]:
        return y[0]
    for left in range(len(x) - 1):
        if at <= x[left + 1]:
            share = (at - x[left]) / (x[left + 1] - x[left])
            return y[left] + share * (y[left + 1] - y[left])
    return y[-1]


def mean_height(x: Sequence[float], y: Sequence[float], end: float) -> float:
    """Area under the piecewise linear curve from its start to ``end``, divided by the width.

    Args:
        x: ascending, at least one.
        y: as many.
        end: where the area ends; not above the last ``x``.

    Example:
        >>> mean_height([0, 10, 20], [0.0, 1.0, 1.0], 20)
        0.75
    """
    if end <= x[0]:
        return y[0]
    inside = [(a, b) for a, b in zip(x, y, strict=True) if a < end] + [(end, interpolate(x, y, end))]
    area = sum((c - a) * (b + d) / 2 for (a, b), (c, d) in pairwise(inside))
    return area / (end - x[0])


def success_at_seconds(curve: Sequence[CurvePoint], seconds: float) -> float:
    """Held-out success after so many seconds of training, interpolated between evaluations."""
    return interpolate([point.seconds for point in curve], [point.success for point in curve], seconds)


def area_under(curve: Sequence[CurvePoint], iterations: int) -> float:
    """Mean held-out success over the first ``iterations``: the normalised area under the validation curve."""
    return mean_height([point.iteration for point in curve], [point.success for point in curve], iterations)


Measure = Callable[[RunRecord, Horizon], "float | None"]


def measures(temperatures: Sequence[str]) -> dict[str, Measure]:
    """What is measured of a run, by name; a measure is ``None`` where a run does not have it.

    Args:
        temperatures: of the tests, the main one first.
    """
    found: dict[str, Measure] = {
        "validation before": lambda run, _: run.before.success if run.before else None,
        "validation after": lambda run, _: run.after.success,
        "area under curve": lambda run, horizon: area_under(run.curve, horizon.iterations),
        "at equal wall-clock": lambda run, horizon: success_at_seconds(run.curve, horizon.seconds),
    }

    def success(temperature: str) -> Measure:
        return lambda run, _: run.tests[temperature].success if temperature in run.tests else None

    def invalid(temperature: str) -> Measure:
        return lambda run, _: run.tests[temperature].invalid if temperature in run.tests else None

    for temperature in temperatures:
        found[f"test, T = {temperature}"] = success(temperature)
    for temperature in temperatures[:1]:
        found[f"invalid turns, T = {temperature}"] = invalid(temperature)
    return found


# --- over seeds -------------------------------------------------------------------------------------------------------


def over_seeds(runs: Sequence[RunRecord], measure: Measure, horizon: Horizon) -> Spread | None:
    """A measure over the runs of one arm; ``None`` if none of them has it."""
    values = [value for run in runs if (value := measure(run, horizon)) is not None]
    return spread(values) if values else None


def paired(
    runs: Sequence[RunRecord], baseline: Sequence[RunRecord], measure: Measure, horizon: Horizon
) -> tuple[dict[int, float], Spread | None]:
    """Differences to the baseline with the same seed.

    Runs of one seed start from the same policy, meet the same training games in the same order and are tested on the
    same games with the same random numbers, so differences by seed vary less than the arms themselves.

    Args:
        runs: of one arm.
        baseline: runs of the other.
        measure: what is compared.
        horizon: of the comparison.

    Returns:
        The difference by seed, and its spread (``None`` without a common seed).
    """
    other = {run.seed: measure(run, horizon) for run in baseline}
    differences = {}
    for run in sorted(runs, key=lambda run: run.seed):
        mine, theirs = measure(run, horizon), other.get(run.seed)
        if mine is not None and theirs is not None:
            differences[run.seed] = mine - theirs
    return differences, spread(list(differences.values())) if differences else None


def by_arm(records: Sequence[RunRecord], order: Sequence[str]) -> Mapping[str, list[RunRecord]]:
    """Runs by arm, in the given order, arms without runs left out; others follow in alphabetical order."""
    names = [name for name in order if any(run.arm == name for run in records)]
    names += sorted({run.arm for run in records} - set(names))
    return {name: sorted((run for run in records if run.arm == name), key=lambda run: run.seed) for name in names}

"""Success rates and their intervals: how much of a difference a number of games can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_RESAMPLED_TOGETHER = 500
"""Resamples in memory at a time."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success probability (Wilson 1927).

    Unlike the usual ``p ± z·sqrt(p(1 - p)/n)`` it stays inside [0, 1] and keeps its coverage at few games and at
    rates near 0 or 1, which is where agents start and end.

    Args:
        successes: episodes that succeeded, ``0 <= successes <= n``.
        n: independent episodes; 0 tells nothing and gives ``(0.0, 1.0)``.
        confidence: two-sided coverage, in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        ValueError: ``successes`` is not in ``[0, n]``, or ``confidence`` not in (0, 1).

    Example:
        >>> low, high = wilson(48, 96)
        >>> f"{low:.3f} {high:.3f}"
        '0.402 0.598'
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n={n}, not {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The exact ends at 0 and n successes are 0 and 1; rounding would leave them off by 1e-17.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def newcombe(before: tuple[int, int], after: tuple[int, int], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two success probabilities, ``after - before`` (Newcombe 1998, method 10).

    Built from the two Wilson intervals. The samples are taken as independent; when both played the same games the
    interval is, if anything, too wide.

    Args:
        before: ``(successes, n)`` of the first sample.
        after: ``(successes, n)`` of the second.
        confidence: two-sided coverage, in (0, 1).

    Returns:
        Lower and upper end, within [-1, 1]; ``(-1.0, 1.0)`` if one of the samples is empty.

    Raises:
        ValueError: as :func:`wilson`.

    Example:
        >>> low, high = newcombe((30, 96), (60, 96))
        >>> f"{low:+.3f} {high:+.3f}"
        '+0.172 +0.436'
    """
    low1, high1 = wilson(*before, confidence)
    low2, high2 = wilson(*after, confidence)
    if before[1] == 0 or after[1] == 0:
        return -1.0, 1.0
    p1, p2 = before[0] / before[1], after[0] / after[1]
    return (
        p2 - p1 - math.hypot(p2 - low2, high1 - p1),
        p2 - p1 + math.hypot(high2 - p2, p1 - low1),
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of ``k`` attempts succeeds (Chen et al. 2021, eq. 1).

    Args:
        n: attempts made, at least ``k``.
        c: successes among them.
        k: attempts allowed, at least 1.

    Raises:
        ValueError: the numbers contradict each other.

    Example:
        >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2)
        (0.25, 0.5)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} successes in {n} attempts cannot be estimated")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap(
    values: Sequence[float], confidence: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: one per independent unit. Where a task is played several times the unit is the task: give its mean.
        confidence: two-sided coverage, in (0, 1).
        resamples: number of resamples with replacement.
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        Lower and upper end; both the value itself if there is only one.

    Raises:
        ValueError: no values, or ``confidence`` not in (0, 1).

    Example:
        >>> low, high = bootstrap([0.0, 1.0] * 50)
        >>> f"{low:.2f} {high:.2f}"
        '0.40 0.60'
    """
    if not len(values):
        raise ValueError("there is nothing to resample")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            array[generator.integers(0, len(array), (min(_RESAMPLED_TOGETHER, resamples - first), len(array)))].mean(1)
            for first in range(0, resamples, _RESAMPLED_TOGETHER)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

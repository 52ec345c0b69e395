"""Curriculum schedules over iterations: μ(t) of the tool reward (§1.2), γ(t) of self-imitation (§3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


def cosine_decay(t: float, horizon: float) -> float:
    """μ(t) = ½(cos(π·t/T) + 1) for ``t ≤ T``, then 0.

    Args:
        t: iteration, from 0.
        horizon: T in iterations; 0 means decayed from the start.

    Raises:
        ValueError: a negative argument.
    """
    _check(t, horizon)
    return 0.0 if t >= horizon else 0.5 * (math.cos(math.pi * t / horizon) + 1)


def cosine_warmup(t: float, horizon: float) -> float:
    """γ(t) = ½(1 − cos(π·t/T)) for ``t ≤ T``, then 1.

    Args:
        t: iteration, from 0.
        horizon: T in iterations; 0 means warm from the start.

    Raises:
        ValueError: a negative argument.
    """
    return 1.0 - cosine_decay(t, horizon)


def _check(t: float, horizon: float) -> None:
    if t < 0 or horizon < 0:
        raise ValueError(f"a schedule needs t and horizon of at least 0, not t={t}, horizon={horizon}")


class Schedule(ABC):
    """A number for each iteration."""

    @abstractmethod
    def __call__(self, t: int) -> float:
        """The value in iteration ``t``, from 0."""


@dataclass(frozen=True)
class Zero(Schedule):
    """Always 0 (mode ``none``; ``Off`` would be read by YAML as false)."""

    def __call__(self, t: int) -> float:
        """See :class:`Schedule`."""
        return 0.0


@dataclass(frozen=True)
class Constant(Schedule):
    """Always ``value`` (mode ``constant``).

    Args:
        value: the value.
    """

    value: float = 1.0

    def __call__(self, t: int) -> float:
        """See :class:`Schedule`."""
        return self.value


@dataclass(frozen=True)
class CosineDecay(Schedule):
    """From ``start`` down to 0 (mode ``cosine`` of μ).

    Args:
        horizon: T in iterations.
        start: value at iteration 0.
    """

    horizon: int = 200
    start: float = 1.0

    def __post_init__(self) -> None:
        _check(0, self.horizon)

    def __call__(self, t: int) -> float:
        """See :class:`Schedule`."""
        return self.start * cosine_decay(t, self.horizon)


@dataclass(frozen=True)
class CosineWarmup(Schedule):
    """From 0 up to ``peak`` (γ, with ``peak`` = γ_max).

    Args:
        horizon: T in iterations.
        peak: value from iteration T on.
    """

    horizon: int = 200
    peak: float = 1.0

    def __post_init__(self) -> None:
        _check(0, self.horizon)

    def __call__(self, t: int) -> float:
        """See :class:`Schedule`."""
        return self.peak * cosine_warmup(t, self.horizon)

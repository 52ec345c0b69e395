"""Weights as functions of the iteration: μ(t) of the tool reward (§1.2), γ(t) of self-imitation (§3)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from spear_lightning.utils.ranges import NotNegative, in_range


def cosine_decay(t: float, horizon: float) -> float:
    """μ(t) = ½(cos(π·t/T) + 1) for ``t ≤ T``, then 0.

    Args:
        t: iteration, from 0.
        horizon: T in iterations; 0 means decayed from the start.

    Raises:
        ValueError: a negative argument.
    """
    if t < 0 or horizon < 0:
        raise ValueError(f"a schedule needs t and horizon of at least 0, not t={t}, horizon={horizon}")
    return 0.0 if t >= horizon else 0.5 * (math.cos(math.pi * t / horizon) + 1)


def cosine_warmup(t: float, horizon: float) -> float:
    """γ(t) = ½(1 − cos(π·t/T)) for ``t ≤ T``, then 1: what :func:`cosine_decay` leaves of 1.

    Args:
        t: iteration, from 0.
        horizon: T in iterations; 0 means warm from the start.

    Raises:
        ValueError: a negative argument.
    """
    return 1.0 - cosine_decay(t, horizon)


class Schedule(ABC):
    """A number for each iteration."""

    @abstractmethod
    def __call__(self, t: int) -> float:
        """The value in iteration ``t``, from 0."""


@dataclass(frozen=True)
class Zero(Schedule):
    """Always 0 (mode ``none``; ``Off`` would be read by YAML as false)."""

    @override
    def __call__(self, t: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Constant(Schedule):
    """Always ``value`` (mode ``constant``).

    Args:
        value: the value.
    """

    value: float = 1.0

    @override
    def __call__(self, t: int) -> float:
        return self.value


@in_range
@dataclass(frozen=True)
class CosineDecay(Schedule):
    """From ``start`` down to 0 (mode ``cosine`` of μ).

    Args:
        horizon: T in iterations.
        start: value at iteration 0.
    """

    horizon: NotNegative = 200
    start: float = 1.0

    @override
    def __call__(self, t: int) -> float:
        return self.start * cosine_decay(t, self.horizon)


@in_range
@dataclass(frozen=True)
class CosineWarmup(Schedule):
    """From 0 up to ``peak`` (γ, with ``peak`` = γ_max).

    Args:
        horizon: T in iterations.
        peak: value from iteration T on.
    """

    horizon: NotNegative = 200
    peak: float = 1.0

    @override
    def __call__(self, t: int) -> float:
        return self.peak * cosine_warmup(t, self.horizon)

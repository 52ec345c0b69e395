"""Learning rate as a function of the number of updates: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spear_lightning.utils.ranges import Fraction, NotNegative, in_range


@in_range
@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up, then constant or a cosine to ``floor``.

    Args:
        warmup: updates over which the factor rises linearly to 1.
        horizon: update at which the cosine reaches ``floor``; ``None`` keeps the rate constant after the warm-up.
        floor: factor that the cosine ends at.

    Raises:
        ValueError: the cosine would end before the warm-up.
    """

    warmup: NotNegative = 0
    horizon: int | None = None
    floor: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.horizon is not None and self.horizon <= self.warmup:
            raise ValueError(f"model.learning_rate.horizon ({self.horizon}) must lie beyond warmup ({self.warmup})")

    def factor(self, update: int) -> float:
        """Factor on the optimizer's learning rate for the update of this number (from 0)."""
        if update < self.warmup:
            return (update + 1) / self.warmup
        if self.horizon is None:
            return 1.0
        progress = min(1.0, (update - self.warmup) / (self.horizon - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))

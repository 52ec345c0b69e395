"""What a user should know of the quality filters."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn

_MUCH = 0.3
"""Share of filtered episodes from which on a user should know."""


class FilterWarning:
    """Warns once, when a filter takes much out of the loss."""

    def __init__(self) -> None:
        self._given = False

    def look_at(self, shares: Mapping[str, float]) -> None:
        """Take note of an iteration.

        Args:
            shares: of the episodes that each filter took out, the largest first
                (:func:`~spear_lightning.data.scoring.shares_filtered`).
        """
        name, share = next(iter(shares.items()), ("", 0.0))
        if share > _MUCH and not self._given:
            self._given = True
            rank_zero_warn(
                f"data.filters.{name} takes {share:.0%} of this iteration's episodes out of the loss. What is filtered "
                "is never punished, so a policy can drift into it: watch filter/* and rollout/success, and consider "
                f"data.filters.{name}: false"
            )

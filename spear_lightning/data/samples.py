"""The sequences that training sees, made of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from spear_lightning.rollout.episode import Episode, Turn


@dataclass(slots=True)
class Sample:
    """One sequence of tokens to train on; all arrays have shape ``(tokens,)``.

    Attributes:
        ids: token ids, int32.
        mask: true at generated tokens that carry a gradient.
        logps: behaviour log-probabilities, float32; 0 at tokens that were not generated.
        advantages: float32; 0 at tokens that were not generated.
        turns: number of the turn that generated the token, int16; -1 at tokens that were not generated.
        weights: factor of each token's loss (truncated importance sampling), float32; ``None`` is 1 everywhere.
    """

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    logps: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float32]
    turns: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def advantage(self) -> float:
        """Mean advantage of the tokens in the loss; 0 if there are none."""
        return float(self.advantages[self.mask].mean()) if self.mask.any() else 0.0

    def with_advantage(self, advantage: float) -> Sample:
        """The same tokens with one advantage on all that were generated."""
        return replace(self, advantages=np.where(self.turns >= 0, np.float32(advantage), np.float32(0)))


def samples_of(
    episode: Episode, advantages: npt.NDArray[np.floating], keep: npt.NDArray[np.bool_]
) -> list[tuple[int, Sample]]:
    """The training samples of an episode.

    Args:
        episode: as played.
        advantages: one per turn.
        keep: one per turn; false takes the turn out of the loss (its tokens stay in the context).

    Returns:
        ``(first turn, sample)`` pairs: one per turn with at least one generated token in ``stepwise`` context, one for
        the whole episode in ``conversation`` context.
    """
    numbers = range(len(episode.turns))
    if episode.context == "stepwise":
        return [
            (number, _sample(episode.turns, [number], advantages, keep))
            for number in numbers
            if len(episode.turns[number].response_ids)
        ]
    return [(0, _sample(episode.turns, numbers, advantages, keep))] if episode.turns else []


def _sample(
    turns: Sequence[Turn],
    numbers: Sequence[int],
    advantages: npt.NDArray[np.floating],
    keep: npt.NDArray[np.bool_],
) -> Sample:
    """The turns of these numbers, end to end."""
    tokens = sum(len(turns[number].prompt_ids) + len(turns[number].response_ids) for number in numbers)
    sample = Sample(
        ids=np.empty(tokens, np.int32),
        mask=np.zeros(tokens, bool),
        logps=np.zeros(tokens, np.float32),
        advantages=np.zeros(tokens, np.float32),
        turns=np.full(tokens, -1, np.int16),
    )
    end = 0
    for number in numbers:
        turn = turns[number]
        start = end + len(turn.prompt_ids)
        sample.ids[end:start] = turn.prompt_ids
        end = start + len(turn.response_ids)
        sample.ids[start:end] = turn.response_ids
        sample.mask[start:end] = keep[number]
        sample.logps[start:end] = turn.logps
        sample.advantages[start:end] = advantages[number]
        sample.turns[start:end] = number
    return sample

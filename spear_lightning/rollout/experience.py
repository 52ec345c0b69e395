"""Scored episodes as training rows, as replay entries, and replay entries as training rows again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from spear_lightning.algorithm.replay import Drawn, ReplayEntry
from spear_lightning.rollout.episode import Row, rows_of
from spear_lightning.rollout.scored import ScoredEpisode
from spear_lightning.rollout.storage import RowStore


def fresh_rows(scored: Iterable[ScoredEpisode]) -> dict[str, Row]:
    """Rows that carry a loss, by a key that is unique over ranks and iterations."""
    return {key: row for _, key, row in _rows(scored) if row.mask.any()}


def admissible_entries(scored: Iterable[ScoredEpisode], has_tools: bool = True) -> list[ReplayEntry]:
    """Replay entries of the rows with a loss and a positive advantage (algorithm.md §3), their rows put away together.

    Args:
        scored: of one iteration.
        has_tools: the task has tools: only episodes with at least one tool call are admitted.
    """
    store = RowStore()
    entries = [
        ReplayEntry(
            key=key,
            payload=store.add(row),
            reward=item.worth(sorted({int(turn) for turn in row.turns[row.mask]})),
            advantage=row.advantage,
            iteration=item.episode.iteration,
        )
        for item, key, row in _rows(item for item in scored if _may_be_admitted(item, has_tools))
        if row.mask.any() and row.advantage > 0
    ]
    store.complete()
    return entries


def _may_be_admitted(item: ScoredEpisode, has_tools: bool) -> bool:
    """Whether a row of the episode could be admitted; most could not, and need not be made."""
    return bool((item.advantages[item.keep] > 0).any()) and (item.episode.tool_calls > 0 or not has_tools)


def recalibrated(drawn: Sequence[Drawn]) -> dict[str, Row]:
    """Rows of drawn entries with their recalibrated advantage Ã; log-probabilities stay those they were played with."""
    return {item.entry.key: item.entry.payload.with_advantage(item.advantage) for item in drawn}


def _rows(scored: Iterable[ScoredEpisode]) -> Iterator[tuple[ScoredEpisode, str, Row]]:
    for item in scored:
        episode = item.episode
        for turn, row in rows_of(episode, item.advantages, item.keep):
            yield item, f"{episode.iteration}/{episode.group}/{episode.index}/{turn}", row

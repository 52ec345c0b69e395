"""Scored episodes as training rows, as replay entries, and replay entries as training rows again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from spear_lightning.algorithm.replay import Drawn, ReplayEntry, is_admissible
from spear_lightning.data.scored import ScoredEpisode
from spear_lightning.data.token_pool import RowStore
from spear_lightning.rollout.episode import Episode, Row, rows_of


def fresh_rows(scored: Iterable[ScoredEpisode]) -> dict[str, Row]:
    """Rows that carry a loss, by a key that is unique over ranks and iterations."""
    return {
        _key(item.episode, turn): row
        for item in scored
        for turn, row in rows_of(item.episode, item.advantages, item.keep)
        if row.mask.any()
    }


def admissible_entries(
    scored: Iterable[ScoredEpisode], rows: Mapping[str, Row], has_tools: bool = True
) -> list[ReplayEntry]:
    """Replay entries of the rows with a positive advantage (algorithm.md §3), put away together.

    Args:
        scored: of one iteration.
        rows: of these episodes, by the keys of :func:`fresh_rows`, with the log-probabilities to keep.
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
        for item, key, row in _admissible(scored, rows, has_tools)
    ]
    store.complete()
    return entries


def recalibrated(drawn: Sequence[Drawn]) -> dict[str, Row]:
    """Rows of drawn entries with their recalibrated advantage Ã; log-probabilities stay those they were played with."""
    return {item.entry.key: item.entry.payload.with_advantage(item.advantage) for item in drawn}


def _admissible(
    scored: Iterable[ScoredEpisode], rows: Mapping[str, Row], has_tools: bool
) -> Iterator[tuple[ScoredEpisode, str, Row]]:
    for item in scored:
        for turn in range(len(item.episode.turns)):
            key = _key(item.episode, turn)
            if key in rows and is_admissible(rows[key].advantage, item.episode.tool_calls, has_tools):
                yield item, key, rows[key]


def _key(episode: Episode, turn: int) -> str:
    return f"{episode.iteration}/{episode.group}/{episode.index}/{turn}"

"""Allocation of the key-value cache's rows to episodes, and eviction when it is full."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from spear_lightning.engines.huggingface.kv_cache import KeyValueRows

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]

_FULL = (
    "the key-value cache is full: episodes that wait lose their keys and values, which are computed again when they go "
    "on; raise engine.cache_gib, or lower data.max_active"
)


@dataclass(slots=True, eq=False)
class Session:
    """An episode and its part of the cache.

    Attributes:
        name: of the episode.
        row: of the cache; -1 while it has none.
        ids: token ids whose keys and values stand in the row.
        used: LRU clock when it was last used.
    """

    name: str
    row: int = -1
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    used: int = 0


class SessionRows:
    """Allocates the rows of a cache to sessions.

    Args:
        capacity: most tokens of the cache, rows times columns; ``None`` has no limit.

    Attributes:
        cache: the keys and values.
        evicted: number of sessions evicted from a full cache so far.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.cache = KeyValueRows(capacity)
        self.evicted = 0
        self._sessions: dict[str, Session] = {}
        self._rows: list[Session | None] = []
        self._clock = 0

    def session(self, name: str) -> Session:
        """The session of that name, a new one if there is none; it counts as used now."""
        session = self._sessions.setdefault(name, Session(name))
        session.used = self._clock
        return session

    def tick(self) -> None:
        """Advance the LRU clock."""
        self._clock += 1

    def end(self, name: str) -> None:
        """Free a session's row. Unknown names are ignored."""
        session = self._sessions.pop(name, None)
        if session is not None and session.row >= 0:
            self._rows[session.row] = None

    # --- a batch in neighbouring rows ----------------------------------------------------------------------------

    def allocate(self, sessions: Sequence[Session], block: range, columns: int) -> range:
        """Give sessions rows that continue those of a batch. A session with one there keeps it: moving costs.

        Args:
            sessions: that join, not in the batch.
            block: rows of the batch; if it is empty, the new one begins where most of the sessions' rows are already.
            columns: that each row must have.

        Returns:
            The rows of all, those of the batch first.
        """
        if not block:
            block = range(start := self._best_start(sessions), start)
        count = max(block.stop + len(sessions), len(self._rows) + sum(session.row < 0 for session in sessions))
        if not self.fits(columns, count):
            block = self.evict(block, columns, sessions)
        joined = range(block.start, block.stop + len(sessions))
        new = range(block.stop, joined.stop)
        self._rows += [None] * (joined.stop - len(self._rows))
        taken = {session.row for session in sessions}
        coming = [session for session in sessions if session.row not in new]
        for row, session in zip((row for row in new if row not in taken), coming, strict=True):
            self._place(session, row, joined)
        return joined

    def exchange(self, ones: Sequence[int], others: Sequence[int], width: int) -> None:
        """Exchange the first ``width`` columns, and the owners, of rows pairwise."""
        self.cache.reserve(len(self._rows), 0)
        self.cache.swap(list(ones), list(others), width)
        for one, other in zip(ones, others, strict=True):
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]
        for row in (*ones, *others):
            if (session := self._rows[row]) is not None:
                session.row = row

    def _best_start(self, sessions: Sequence[Session]) -> int:
        """First row of the window in which most of the sessions stand."""
        last = len(self._rows) + sum(session.row < 0 for session in sessions) - len(sessions)
        rows = sorted(session.row for session in sessions if 0 <= session.row <= last)
        counts = {row: sum(row <= other < row + len(sessions) for other in rows) for row in rows}
        return max(rows, key=lambda row: (counts[row], -row), default=0)

    def _place(self, session: Session, row: int, batch: range) -> None:
        """Move a session to a row of its batch, in exchange with the row's occupant."""
        occupant = self._rows[row]
        if session.row < 0:
            free = (at for at, other in enumerate(self._rows) if other is None and at not in batch)
            session.row = row if occupant is None else next(free, len(self._rows))
            self._rows[session.row : session.row + 1] = [session]
        if session.row != row:
            self.exchange([session.row], [row], max(len(session.ids), 0 if occupant is None else len(occupant.ids)))

    # --- memory --------------------------------------------------------------------------------------------------

    def reserve(self, columns: int) -> None:
        """Allocate at least this many columns in every row, which must fit (:meth:`fits`)."""
        self.cache.reserve(len(self._rows), columns)

    def fits(self, columns: int, rows: int | None = None) -> bool:
        """Whether ``rows`` rows (by default the present ones) of ``columns`` columns fit into the capacity."""
        capacity = self.cache.capacity
        count = len(self._rows) if rows is None else rows
        return capacity is None or count * max(columns, self.cache.columns) <= capacity

    def evict(self, block: range, columns: int, joining: Sequence[Session] = ()) -> range:
        """Make room: drop unused rows, then the least recently used sessions.

        Args:
            block: rows of the batch, which stays.
            columns: that each row must have.
            joining: sessions that stay too, and need a row if they have none.

        Returns:
            The rows of the batch, which are the first ones now; those of ``joining`` follow.
        """
        capacity, width = self.cache.capacity, self.cache.columns
        assert capacity is not None
        batch = [session for session in self._rows[block.start : block.stop] if session is not None]
        staying = {id(session) for session in (*batch, *joining)}
        idle = [s for s in self._sessions.values() if s.row >= 0 and id(s) not in staying]
        idle.sort(key=lambda session: (session.used, session.row))
        while idle and (len(staying) + len(idle)) * max(columns, *(len(s.ids) for s in idle)) > capacity:
            self.end(idle.pop(0).name)
            if not self.evicted:
                logger.warning(_FULL)
            self.evicted += 1
        self.cache.reserve(len(self._rows), 0)
        placed = [session for session in joining if session.row >= 0]
        order = [*batch, *placed, *sorted(idle, key=lambda session: session.row)]
        for target, session in enumerate(order):
            if session.row != target:
                self.exchange([target], [session.row], width)
        del self._rows[len(order) :]
        longest = max((len(session.ids) for session in idle), default=0)
        self.cache.resize(len(staying) + len(idle), max(columns, longest))
        return range(len(batch))

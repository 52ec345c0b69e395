"""Which session is answered by which server."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence


class StickySessions:
    """Gives each session a server and leaves it there, for the sake of the server's prefix cache.

    A new session goes to the server that has fewest: with the same sessions in the same order, to the same server. Only
    sessions of a server that is gone move. May be used by many threads.

    Args:
        servers: names.

    Attributes:
        first: number of the server that the first session goes to (ranks begin at different ones).

    >>> sessions = StickySessions(["a", "b"])
    >>> [sessions.place(name) for name in ("1", "2", "3", "1")]
    ['a', 'b', 'a', 'a']
    >>> sessions.lose("a")
    >>> [sessions.place(name) for name in ("1", "2", "3")]
    ['b', 'b', 'b']
    """

    def __init__(self, servers: Sequence[str]) -> None:
        self.first = 0
        self._servers = list(servers)
        self._lost: set[str] = set()
        self._of_session: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def lost(self) -> set[str]:
        """Servers that are gone."""
        with self._lock:
            return set(self._lost)

    def place(self, session: str) -> str:
        """The session's server.

        Raises:
            LookupError: all servers are gone.
        """
        with self._lock:
            server = self._of_session.get(session)
            if server is None or server in self._lost:
                shift = self.first % len(self._servers)
                order = [*self._servers[shift:], *self._servers[:shift]]
                counts = {name: 0 for name in order if name not in self._lost}
                if not counts:
                    raise LookupError("no server is left")
                for other in self._of_session.values():
                    if other in counts:
                        counts[other] += 1
                server = self._of_session[session] = min(counts, key=counts.__getitem__)
            return server

    def end(self, session: str) -> None:
        """Forget a session."""
        with self._lock:
            self._of_session.pop(session, None)

    def lose(self, server: str) -> None:
        """A server is gone."""
        with self._lock:
            self._lost.add(server)

    def find(self, server: str) -> None:
        """A server is back: it gets new sessions."""
        with self._lock:
            self._lost.discard(server)

    def set_lost(self, servers: Iterable[str]) -> None:
        """These servers are gone, and no others."""
        with self._lock:
            self._lost = set(servers)

"""Which session is answered by which server."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence


class StickySessions:
    """Assigns each session to a server and leaves it there, for the sake of the server's prefix cache.

    A new session goes to the server that has fewest: with the same sessions in the same order, to the same server. Only
    sessions of a lost server move. May be used by many threads.

    Args:
        servers: names.

    Attributes:
        first: number of the server that the first session goes to (ranks begin at different ones).
        lost: names of the servers that do not answer.

    >>> sessions = StickySessions(["a", "b"])
    >>> [sessions.place(name) for name in ("1", "2", "3", "1")]
    ['a', 'b', 'a', 'a']
    >>> sessions.lost.add("a")
    >>> [sessions.place(name) for name in ("1", "2", "3")]
    ['b', 'b', 'b']
    """

    def __init__(self, servers: Sequence[str]) -> None:
        self.first = 0
        self.lost: set[str] = set()
        self._servers = list(servers)
        self._of_session: dict[str, str] = {}
        self._lock = threading.Lock()

    def place(self, session: str) -> str:
        """The session's server.

        Raises:
            LookupError: all servers are lost.
        """
        with self._lock:
            server = self._of_session.get(session)
            if server is None or server in self.lost:
                shift = self.first % len(self._servers)
                live = [name for name in self._servers[shift:] + self._servers[:shift] if name not in self.lost]
                if not live:
                    raise LookupError("no server is left")
                server = self._of_session[session] = min(live, key=Counter(self._of_session.values()).__getitem__)
            return server

    def end(self, session: str) -> None:
        """Forget a session."""
        with self._lock:
            self._of_session.pop(session, None)

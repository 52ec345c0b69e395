"""JSON over HTTP, asked of a service that may be away: an answer, or one of two errors."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")

_LONGEST_PAUSE = 30.0


class NoAnswerError(ConnectionError):
    """The service cannot be reached, is silent for too long, or says what is not JSON."""


class StatusError(RuntimeError):
    """The service answers with an error.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}: {said}")
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Whether it may answer later: it is overloaded or broken, and does not refuse what it was asked."""
        return self.status == 429 or self.status >= 500


def ask(
    address: str,
    body: Any = None,
    *,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
    most_bytes: int | None = None,
) -> Any:
    """Send a request and read the answer.

    Args:
        address: of the request, with its path.
        body: sent as JSON; ``None`` sends none.
        seconds: after which there is no answer.
        headers: beyond the type of the content.
        method: by default POST with a body and GET without.
        most_bytes: of the answer that are read; one that is longer is not JSON any more.

    Returns:
        The answer, ``None`` if it is empty.

    Raises:
        NoAnswerError: there is none that can be read.
        StatusError: it is an error.
    """
    content = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(
        address, content, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(asked, timeout=seconds) as response:
            answer = response.read(most_bytes)
            return json.loads(answer) if answer else None
    except urllib.error.HTTPError as error:
        raise StatusError(error.code, error.read(2000).decode("utf-8", "replace")) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswerError(f"{type(error).__name__}: {error}") from error


def persist(call: Callable[[], _T], attempts: int, pause: float) -> _T:
    """Call again what failed in a way that may pass.

    Args:
        call: of :func:`ask`.
        attempts: most calls, at least 1.
        pause: seconds before the second call; it doubles, up to half a minute.

    Raises:
        NoAnswerError: that of the last call.
        StatusError: that of the last call, or one that refuses.
    """
    for attempt in range(attempts):
        try:
            return call()
        except (NoAnswerError, StatusError) as error:
            if attempt + 1 == attempts or (isinstance(error, StatusError) and not error.may_pass):
                raise
        time.sleep(min(_LONGEST_PAUSE, pause * 2**attempt))
    raise ValueError(f"attempts must be at least 1, not {attempts}")

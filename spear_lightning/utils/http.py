"""JSON over HTTP: an answer, or one of two errors; retries."""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections.abc import Mapping
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

_MAX_PAUSE = 30.0  # seconds
_MAX_BYTES = 64 << 20  # of an answer; a longer one is not read to its end
_MAX_ERROR_BYTES = 2000


class NoAnswerError(ConnectionError):
    """The service cannot be reached, is silent for too long, or its answer is not JSON."""


class StatusError(RuntimeError):
    """The service answers with an error.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text}")
        self.status = status


class JSONClient:
    """Sends and receives JSON over persistent connections; thread-safe.

    Args:
        seconds: timeout of connecting, and of each wait for further bytes.
        headers: of every request.
    """

    def __init__(self, seconds: float, headers: Mapping[str, str] | None = None) -> None:
        self._seconds = seconds
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def request(self, url: str, body: Any = None, seconds: float | None = None) -> Any:
        """Send a request and read the answer.

        Args:
            url: of the request.
            body: sent by POST as JSON; ``None`` makes it a GET.
            seconds: instead of the client's.

        Returns:
            The answer, ``None`` if it is empty.

        Raises:
            NoAnswerError: there is none that can be read.
            StatusError: it is an error.
        """
        # json.dumps escapes what is not ASCII: lone surrogates, which model output may hold, have no UTF-8.
        content, method = (None, "GET") if body is None else (json.dumps(body).encode(), "POST")
        try:
            with self._open().stream(method, url, content=content, timeout=seconds or self._seconds) as response:
                if response.is_error:
                    raise StatusError(response.status_code, _read(response, _MAX_ERROR_BYTES).decode(errors="replace"))
                answer = _read(response, _MAX_BYTES)
            return json.loads(answer) if answer else None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            raise NoAnswerError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the connections; the next request opens one again."""
        if self._client is not None:
            self._client.close()

    def _open(self) -> httpx.Client:
        with self._lock:
            if self._client is None or self._client.is_closed:
                self._client = httpx.Client(
                    headers=self._headers,
                    verify=ssl.create_default_context(),  # the system's certificates
                    follow_redirects=True,
                    # As many connections as callers. Servers close idle ones (uvicorn after 5 s); do so before they do.
                    limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
                )
            return self._client


def bearer(variable: str) -> dict[str, str]:
    """The header that carries the API key in an environment variable; none if that is unset or empty."""
    key = os.environ.get(variable)
    return {"Authorization": f"Bearer {key}"} if key else {}


def retry(attempts: int, pause: float) -> Retrying:
    """Calls what it is given until it succeeds: ``retry(3, 0.5)(client.request, url)``.

    Args:
        attempts: at most. The last error is raised, and at once a :class:`StatusError` that is a refusal.
        pause: seconds before the second attempt; it doubles, up to 30.
    """
    return Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=pause, max=_MAX_PAUSE),
        retry=retry_if_exception(_is_temporary),
        reraise=True,
    )


def _is_temporary(error: BaseException) -> bool:
    """Whether a retry may succeed: no answer, or a status that says overloaded or broken, not refused."""
    if isinstance(error, StatusError):
        return error.status == 429 or error.status >= 500
    return isinstance(error, NoAnswerError)


def _read(response: httpx.Response, limit: int) -> bytes:
    """The first ``limit`` bytes of an answer."""
    content = bytearray()
    for part in response.iter_bytes():
        content += part
        if len(content) >= limit:
            break
    return bytes(content[:limit])

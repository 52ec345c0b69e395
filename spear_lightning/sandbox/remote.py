"""A sandbox service over HTTP that speaks SandboxFusion's protocol: ``POST /run_code``."""

from __future__ import annotations

import time
from typing import Any

from spear_lightning.sandbox.base import Execution, Sandbox, SandboxError, SandboxLimits, join_error
from spear_lightning.utils.http import NoAnswerError, StatusError, ask, persist

_GRACE_SECONDS = 10.0  # on top of the snippet's own time: queueing and the way there and back
_PAUSE_SECONDS = 0.2
_MAX_REPLY = 64 << 20


class RemoteSandbox(Sandbox):
    """Snippets run by a service elsewhere. What it contains is up to who operates it; nothing is tried out here.

    Args:
        url: of the service, ``/run_code`` not included; it must begin with ``http://`` or ``https://``.
        limits: ``wall_seconds`` and ``memory_mb`` are passed on; longer output than ``output_bytes`` is cut off
            here. The others are the service's own.
        attempts: how often a request is sent before giving up on a service that cannot be reached, or answers that it
            is overloaded or broken.
        headers: sent with each request (authorization, for example).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        limits: SandboxLimits | None = None,
        attempts: int = 3,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(limits)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, not {url!r}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {attempts}")
        self.url = url.rstrip("/")
        self.attempts = attempts
        self.headers = dict(headers or {})

    def _reset(self) -> None:
        super()._reset()
        self._checked = False

    def open(self) -> None:
        """Ask the service for 6 times 7, the first time."""
        if not self._checked:
            result = self._call("print(6 * 7)")
            if result.stdout.strip() != "42":
                raise SandboxError(f"{self.url} does not run Python: {result.error or result.stdout!r}")
            self._checked = True

    def run(self, code: str) -> Execution:
        """Have the service run a snippet."""
        self.open()
        return self._call(code)

    def close(self) -> None:
        """Nothing is held open; the next call asks the service again whether it works."""
        self._checked = False

    def _call(self, code: str) -> Execution:
        started = time.monotonic()
        answer = self._post(
            {
                "code": code,
                "language": "python",
                "run_timeout": self.limits.wall_seconds,
                "memory_limit_MB": self.limits.memory_mb,
            }
        )
        return self._execution(answer, time.monotonic() - started)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            answer = ask(
                f"{self.url}/run_code",
                body,
                seconds=self.limits.wall_seconds + _GRACE_SECONDS,
                headers=self.headers,
                most_bytes=_MAX_REPLY,
            )
            if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
                return answer
            raise NoAnswerError(f"unexpected answer {str(answer)[:300]!r}")

        try:
            return persist(call, self.attempts, _PAUSE_SECONDS)
        except (NoAnswerError, StatusError) as error:
            raise SandboxError(f"the sandbox service {self.url} cannot be used: {error}") from error

    def _execution(self, answer: dict[str, Any], seconds: float) -> Execution:
        result = answer.get("run_result") or answer.get("compile_result") or {}
        limit = self.limits.output_bytes
        stdout, stderr = _cut(result.get("stdout"), limit), _cut(result.get("stderr"), limit)
        if answer["status"] == "Success":
            return Execution(stdout, "", stderr, seconds)
        reason = str(answer.get("message") or "")
        if result.get("status") == "TimeLimitExceeded":
            reason = f"killed after {self.limits.wall_seconds:g} s"
        elif not stderr and not reason:
            reason = f"exit code {result.get('return_code')}"
        return Execution(stdout, join_error(stderr, reason), stderr, seconds)


def _cut(text: object, limit: int) -> str:
    return str(text or "").encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")

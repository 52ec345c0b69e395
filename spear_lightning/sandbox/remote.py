"""A sandbox service over HTTP that speaks SandboxFusion's protocol: ``POST /run_code``."""

from __future__ import annotations

import time
from typing import Any

from typing_extensions import override

from spear_lightning.sandbox.base import Execution, Sandbox, SandboxError, SandboxLimits, join_error
from spear_lightning.utils.http import JSONClient, NoAnswerError, StatusError, retry
from spear_lightning.utils.ranges import Positive, in_range

_GRACE_SECONDS = 10.0  # on top of the snippet's own time: queueing and the way there and back
_PAUSE_SECONDS = 0.2


@in_range
class RemoteSandbox(Sandbox):
    """Snippets run by a service elsewhere. What it contains is up to who operates it; nothing is tried out here.

    Args:
        url: of the service, ``/run_code`` not included; it must begin with ``http://`` or ``https://``.
        limits: ``wall_seconds`` and ``memory_mb`` are passed on; longer output than ``output_bytes`` is cut off
            here. The others are the service's own.
        attempts: to reach a service that is away, overloaded or broken.
        headers: sent with each request (authorization, for example).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        limits: SandboxLimits | None = None,
        attempts: Positive = 3,
        headers: dict[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, not {url!r}")
        self.url, self.attempts, self.headers = url.rstrip("/"), attempts, dict(headers or {})
        super().__init__(limits)

    @override
    def _reset(self) -> None:
        super()._reset()
        self._checked = False
        self._client = JSONClient(self.limits.wall_seconds + _GRACE_SECONDS, self.headers)

    @override
    def open(self) -> None:
        if not self._checked:
            result = self._call("print(6 * 7)")
            if result.stdout.strip() != "42":
                raise SandboxError(f"{self.url} does not run Python: {result.error or result.stdout!r}")
            self._checked = True

    @override
    def run(self, code: str) -> Execution:
        self.open()
        return self._call(code)

    @override
    def close(self) -> None:
        self._client.close()
        self._checked = False

    def _call(self, code: str) -> Execution:
        body = {
            "code": code,
            "language": "python",
            "run_timeout": self.limits.wall_seconds,
            "memory_limit_MB": self.limits.memory_mb,
        }
        started = time.monotonic()
        try:
            answer = retry(self.attempts, _PAUSE_SECONDS)(self._post, body)
        except (NoAnswerError, StatusError) as error:
            raise SandboxError(f"the sandbox service {self.url} cannot be used: {error}") from error
        return self._execution(answer, time.monotonic() - started)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.request(f"{self.url}/run_code", body)
        if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
            return answer
        raise NoAnswerError(f"unexpected answer {str(answer)[:300]!r}")

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

"""Pydantic's Monty: an interpreter of a subset of Python, written in Rust, in processes of its own; no root needed."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from typing_extensions import override

from spear_lightning.sandbox.base import Execution, SandboxError, Session, join_error
from spear_lightning.sandbox.selftest import TestedSandbox

_MIB = 1 << 20
_GRACE_SECONDS = 2.0
_MAX_CODE_BYTES = 1 << 20  # its parser takes memory that its own limits do not count
_SESSIONS = 64


class MontySandbox(TestedSandbox):
    """Calls in Monty, which knows no files, network, processes or clock but those its host gives it: none.

    It needs ``pip install 'spear-lightning[math]'`` and nothing else. It has ``math``, ``re``, ``json`` and parts of
    the language and of other modules, but no numpy and no sympy; what it lacks is an error that names it.

    Args:
        limits: what one call may use; ``processes`` and ``disk_mb`` mean nothing here, and processor time is not
            limited apart from the time by the clock.
        self_test: whether opening it tries to escape first, and refuses to go on if that succeeds (0.4 s).
    """

    @override
    def _reset(self) -> None:
        super()._reset()
        self._pool: Any = None
        self._owner = 0

    @override
    def _start(self) -> None:
        if self._pool is not None and self._owner == os.getpid():
            return
        try:
            from pydantic_monty import Monty
        except ImportError as error:
            raise SandboxError("pydantic-monty is not installed: pip install 'spear-lightning[math]'") from error
        try:
            pool = Monty(
                max_processes=_SESSIONS,
                checkout_timeout=self.limits.wall_seconds,
                request_timeout=self.limits.wall_seconds + _GRACE_SECONDS,
            )
            pool.__enter__()
        except (OSError, RuntimeError) as error:
            raise SandboxError(f"pydantic-monty does not start: {error}") from error
        self._pool, self._owner = pool, os.getpid()

    @override
    def session(self) -> Session:
        self.open()
        return MontySession(self)

    @override
    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and self._owner == os.getpid():
                pool.__exit__(None, None, None)

    def checkout(self, wall: float) -> Any:
        """A context manager of one interpreter, which nobody else has while it is entered.

        Args:
            wall: seconds by the clock for each snippet.
        """
        limits: Any = {
            "max_feed_duration_secs": wall,
            "max_total_sleep_secs": wall,
            "max_memory": self.limits.memory_mb * _MIB,
        }
        return self._pool.checkout(script_name="code.py", limits=limits)

    @override
    def call(self, code: str, wall: float) -> Execution:
        """One snippet in an interpreter that nobody used and nobody will use."""
        with self.checkout(wall) as interpreter:
            return feed(interpreter, code, self.limits.output_bytes)[0]


class MontySession(Session):
    """One interpreter for an episode.

    Args:
        sandbox: opened.
    """

    def __init__(self, sandbox: MontySandbox) -> None:
        self._sandbox = sandbox
        self._checkout = contextlib.ExitStack()
        self._interpreter: Any = None

    @override
    def run(self, code: str) -> Execution:
        if self._interpreter is None:
            self._sandbox.open()
            interpreter = self._sandbox.checkout(self._sandbox.limits.wall_seconds)
            self._interpreter = self._checkout.enter_context(interpreter)
        result, usable = feed(self._interpreter, code, self._sandbox.limits.output_bytes)
        if usable:
            return result
        self.close()
        lost = join_error(result.error, "the session's variables are lost")
        return Execution(result.stdout, lost, result.stderr, result.seconds)

    @override
    def close(self) -> None:
        self._interpreter = None
        self._checkout.close()


def feed(interpreter: Any, code: str, output_bytes: int) -> tuple[Execution, bool]:
    """Run a snippet in an interpreter.

    Args:
        interpreter: of Monty.
        code: Python source.
        output_bytes: what may be printed.

    Returns:
        What it did, and whether the interpreter can be used again: not after a time limit, nor if it crashed.
    """
    from pydantic_monty import CollectStreams, MontyCrashedError, MontyError, MontyRuntimeError

    started = time.monotonic()
    size = len(code.encode("utf-8", "surrogatepass"))
    if size > _MAX_CODE_BYTES:
        return Execution("", f"the code is {size} bytes long; at most {_MAX_CODE_BYTES} are run"), True
    output = CollectStreams(max_bytes=output_bytes)
    error, usable = "", True
    try:
        interpreter.feed_run(code, print_callback=output)
    except MontyCrashedError as crash:
        error, usable = f"the interpreter was ended: {crash}", False
    except MontyRuntimeError as raised:
        error = raised.display()
        # Monty does not promise anything about an interpreter that was stopped in the middle of something.
        usable = not isinstance(raised.exception(), (TimeoutError, MemoryError))
    except MontyError as raised:
        error = f"{type(raised).__name__}: {raised}"
    stdout, stderr = ("".join(text for at, text in output.output if at == name) for name in ("stdout", "stderr"))
    return Execution(stdout, error, stderr, time.monotonic() - started), usable

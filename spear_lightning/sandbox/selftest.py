"""The self-test of a sandbox: snippets try to escape from it, and the host checks whether one succeeded."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from typing_extensions import override

from spear_lightning.sandbox.base import Execution, Sandbox, SandboxError, SandboxLimits

_LOOP_SECONDS = 0.3
_LATE_SECONDS = 5.0
_MIB = 1 << 20

Run = Callable[[str, float], Execution]


def verify(sandbox: Sandbox, run: Run) -> None:
    """Try to escape from an opened sandbox; also check that honest code still works.

    Snippets try to read a file of this machine, to write one, to connect to a port of this machine, to see this
    process, to use more processes, memory and time than the limits allow, and to leave something behind for the next
    call.

    Args:
        sandbox: to try, opened.
        run: makes a call with a wall limit of its own, in seconds.

    Raises:
        SandboxError: something got out, or an honest snippet failed; the message lists what.
    """
    escapes = [*_honest(run), *_files(run), *_network(run), *_processes(sandbox, run), *_resources(sandbox, run)]
    escapes += _honest(run)
    if escapes:
        raise SandboxError(f"{type(sandbox).__name__} does not contain code on this machine: {'; '.join(escapes)}")


def _honest(run: Run) -> Iterator[str]:
    result = run("import math\nprint(math.factorial(20))", 10.0)
    if result.stdout != "2432902008176640000\n" or result.error:
        yield f"an honest snippet failed ({(result.error or result.stdout)[-300:]!r})"


def _files(run: Run) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="spear-canary-") as folder:
        token, canary, left = secrets.token_hex(16), Path(folder, "canary"), Path(folder, "left")
        canary.write_text(token)
        if token in run(f"print(open({str(canary)!r}).read())", 5.0).stdout:
            yield "it read a file of this machine"
        run(f"open({str(left)!r}, 'w').write('x')", 5.0)
        if left.exists() or canary.read_text() != token:
            yield "it wrote a file of this machine"
    run("import sys, builtins\nopen('/tmp/left', 'w').write('x')\nsys.left = builtins.left = 1", 5.0)
    kept = (
        "import sys, os, builtins\nprint(hasattr(sys, 'left'), hasattr(builtins, 'left'), os.path.exists('/tmp/left'))"
    )
    if "True" in run(kept, 5.0).stdout:
        yield "a call saw what an earlier one left"


def _network(run: Run) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        port = listener.getsockname()[1]
        run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1).sendall(b'x')", 5.0)
        with contextlib.suppress(TimeoutError):
            listener.accept()[0].close()
            yield "it connected to a port of this machine"


def _processes(sandbox: Sandbox, run: Run) -> Iterator[str]:
    token = secrets.token_hex(16)
    if token in run(f"import os\nos.kill({os.getpid()}, 0)\nprint({token!r})", 5.0).stdout:
        yield "it can signal processes of this machine"
    if token in run(f"import os\nos.stat('/proc/{os.getpid()}')\nprint({token!r})", 5.0).stdout:
        yield "it sees processes of this machine"
    limit = sandbox.limits.processes
    many = f"""
import os, time
for n in range({limit + 8}):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    print(n + 2, flush=True)
"""
    counts = [int(line) for line in run(many, 3.0).stdout.split() if line.isdigit()]
    if max(counts, default=0) > limit:
        yield f"it ran {max(counts)} processes where {limit} are allowed"


def _resources(sandbox: Sandbox, run: Run) -> Iterator[str]:
    token = secrets.token_hex(16)
    more = sandbox.limits.memory_mb + 64
    if token in run(f"x = bytearray({more} * {_MIB})\nprint({token!r})", 10.0).stdout:
        yield f"it took {more} MiB of memory"
    started = time.monotonic()
    result = run("while True:\n    pass", _LOOP_SECONDS)
    if not result.error or time.monotonic() - started > max(_LOOP_SECONDS, sandbox.limits.wall_seconds) + _LATE_SECONDS:
        yield "an endless loop was not ended"


class TestedSandbox(Sandbox):
    """A sandbox on this machine, which is trusted only after it failed to escape.

    Args:
        limits: what one call may use.
        self_test: whether opening it the first time tries to escape, and refuses to go on if that succeeds.
    """

    __test__ = False  # its name is not that of a test

    def __init__(self, limits: SandboxLimits | None = None, self_test: bool = True) -> None:
        super().__init__(limits)
        self.self_test = self_test

    @override
    def _reset(self) -> None:
        super()._reset()
        self._verified = False

    @override
    def open(self) -> None:
        with self._lock:
            self._start()
            if self.self_test and not self._verified:
                try:
                    verify(self, self.call)
                except BaseException:
                    self.close()
                    raise
                self._verified = True

    @override
    def run(self, code: str) -> Execution:
        self.open()
        return self.call(code, self.limits.wall_seconds)

    @abstractmethod
    def _start(self) -> None:
        """Start what has to be started, unless that was done."""

    @abstractmethod
    def call(self, code: str, wall: float) -> Execution:
        """Run a snippet without a test of the sandbox first.

        Args:
            code: Python source.
            wall: seconds by the clock.

        Raises:
            SandboxError: the sandbox cannot be used.
        """

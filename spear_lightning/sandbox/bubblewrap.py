"""Python with numpy and sympy in a bubblewrap sandbox that starts once and forks for each call."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Sequence

from typing_extensions import override

from spear_lightning.sandbox import jail
from spear_lightning.sandbox.base import Execution, SandboxLimits, Session, join_error
from spear_lightning.sandbox.inside.wire import MAX_CODE_BYTES, Action, Outcome, Reply, Request
from spear_lightning.sandbox.selftest import TestedSandbox
from spear_lightning.sandbox.zygote_process import ZygoteLostError, ZygoteProcess

_MIB = 1 << 20
_PRELOAD = (
    "numpy",
    "sympy",
    # What sympy imports only when it is first needed: 50 to 400 ms that each call would pay again.
    "sympy.combinatorics",
    "sympy.integrals.heurisch",
    "sympy.integrals.manualintegrate",
    "sympy.integrals.risch",
    "sympy.physics.units",
    "sympy.tensor.tensor",
)
_SESSION_CPU = 64  # a session's processes may use so many times the processor time of a call


class BubblewrapSandbox(TestedSandbox):
    """Each call in a fork of an interpreter that has its libraries loaded, under bubblewrap.

    It needs the program ``bwrap`` and a kernel (5.8 or newer) that lets it make namespaces: as root, or as any user
    where unprivileged user namespaces are allowed. ``docs/sandbox.md`` tells what is contained and by what.

    Args:
        limits: what one call may use.
        packages: names of packages that exist inside besides the standard library.
        preload: names of modules that are imported before the first call, so that importing them costs nothing.
        self_test: whether opening it tries to escape first, and refuses to go on if that succeeds (0.8 s).
        executable: path of ``bwrap``; ``None`` looks it up.

    Random numbers of ``random`` and ``numpy.random`` begin with the same seed in every call, and sets have the same
    order, so that an episode can be repeated.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        packages: Sequence[str] = ("numpy", "sympy", "mpmath"),
        preload: Sequence[str] = _PRELOAD,
        self_test: bool = True,
        executable: str | None = None,
    ) -> None:
        super().__init__(limits, self_test)
        self.packages = tuple(packages)
        self.preload = tuple(preload)
        self.executable = executable

    @override
    def _reset(self) -> None:
        super()._reset()
        self._process: ZygoteProcess | None = None
        self._sessions: set[int] = set()
        self._serials = itertools.count(1)

    @override
    def session(self) -> Session:
        """Begin a session: a fork that stays, and is stopped between its calls."""
        self.open()
        return BubblewrapSession(self, next(self._serials))

    @override
    def close(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            self._sessions.clear()
            if process is not None:
                process.close()

    @override
    def call(self, code: str, wall: float, session: int = 0) -> Execution:
        """Send one snippet to the zygote; if that is lost over it, the next call starts another.

        Args:
            code: Python source.
            wall: seconds by the clock.
            session: number of the session; 0 for a call of its own.

        Raises:
            SandboxError: no zygote can be started.
        """
        encoded = code.encode("utf-8", "surrogatepass")
        if len(encoded) > MAX_CODE_BYTES:
            return Execution("", f"the code is {len(encoded)} bytes long; at most {MAX_CODE_BYTES} are run")
        with self._lock:
            started = time.monotonic()
            process = self._ready()
            if session and session not in self._sessions:
                self._sessions.add(session)
                self._limit_group(process)
            action = Action.RUN_IN_SESSION if session else Action.RUN
            try:
                reply = process.ask(Request(action, session, wall, encoded), wall)
            except ZygoteLostError as error:
                self.close()
                lost = "; the session's variables are lost" if session else ""
                return Execution("", f"the sandbox was ended: {error}{lost}", seconds=time.monotonic() - started)
            return self._execution(reply, wall, time.monotonic() - started, bool(session))

    def end_session(self, session: int) -> None:
        """Forget a session."""
        with self._lock:
            if self._process is not None and self.has_session(session):
                with contextlib.suppress(ZygoteLostError):
                    self._process.ask(Request(Action.END_SESSION, session), 1.0)
                self._sessions.discard(session)
                self._limit_group(self._process)

    def has_session(self, session: int) -> bool:
        """Whether a session has begun in the zygote that runs now."""
        with self._lock:
            return session in self._sessions and self._process is not None and self._process.alive()

    @property
    def controllers(self) -> tuple[str, ...]:
        """What control groups limit here, of ``pids`` and ``memory``."""
        with self._lock:
            return tuple(self._ready().group.files)

    @override
    def _start(self) -> None:
        self._ready()

    def _ready(self) -> ZygoteProcess:
        process = self._process
        if process is None or not process.alive():
            self.close()
            settings = {
                "memory": self.limits.memory_mb * _MIB,
                "cpu": self.limits.cpu,
                "session_cpu": self.limits.cpu * _SESSION_CPU,
                "processes": self.limits.processes,
                "disk": self.limits.disk_mb * _MIB,
                "output": self.limits.output_bytes,
                "preload": self.preload,
                "own_path": jail.OWN_PATH,
                "privileged": jail.privileged(),
                "first_user": jail.first_user(),
            }
            self._process = process = ZygoteProcess(jail.command(json.dumps(settings), self.packages, self.executable))
            self._limit_group(process)
        return process

    def _limit_group(self, process: ZygoteProcess) -> None:
        cells = 1 + len(self._sessions)
        memory = self.limits.memory_mb + self.limits.disk_mb
        process.limit(cells * self.limits.processes, cells * memory * _MIB)

    def _execution(self, reply: Reply, wall: float, seconds: float, in_session: bool) -> Execution:
        stdout, stderr = (data.decode("utf-8", "replace") for data in (reply.stdout, reply.stderr))
        reason = {
            Outcome.EXITED: "" if stderr or not reply.value else f"exit code {reply.value}",
            Outcome.SIGNALLED: f"killed by signal {reply.value}" + (" (out of memory?)" if reply.value == 9 else ""),
            Outcome.WALL: f"killed after {wall:g} s",
            Outcome.CPU: f"killed after {self.limits.cpu} s of processor time",
            Outcome.OUTPUT: f"killed: more than {self.limits.output_bytes} bytes of output",
        }.get(reply.outcome, "the sandbox could not start it")
        failed = reply.outcome != Outcome.EXITED or reply.value != 0 or (in_session and not reply.alive)
        if failed and in_session and not reply.alive:
            reason = join_error(reason, "the session's variables are lost")
        return Execution(stdout, join_error(stderr, reason) if failed else "", stderr, seconds)


class BubblewrapSession(Session):
    """A forked interpreter that waits, stopped, between the calls of one episode.

    Args:
        sandbox: whose zygote forks it.
        number: unique in that sandbox.
    """

    def __init__(self, sandbox: BubblewrapSandbox, number: int) -> None:
        self._sandbox = sandbox
        self._number = number
        self._started = False

    @override
    def run(self, code: str) -> Execution:
        known = self._sandbox.has_session(self._number)
        result = self._sandbox.call(code, self._sandbox.limits.wall_seconds, self._number)
        if self._started and not known:
            lost = "the session had been ended by the failure of another call; its variables were lost"
            result = Execution(result.stdout, join_error(result.error, lost), result.stderr, result.seconds)
        self._started = True
        return result

    @override
    def close(self) -> None:
        self._started = False
        self._sandbox.end_session(self._number)

"""The interface of sandboxes: run a Python snippet, return what it printed.

A sandbox is a small picklable description until it is opened: a task suite carries one to its worker processes, and
each opens its own at the first call.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from spear_lightning.utils.ranges import Above0, Positive, in_range

INSTALL_HINT = "apt-get install bubblewrap (or your distribution's command), or pip install 'spear-lightning[math]'"


class SandboxError(RuntimeError):
    """The sandbox itself cannot be used: not installed, not permitted here, not containing, or not reachable."""


@in_range
@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What one call may use.

    Attributes:
        wall_seconds: time by the clock, after which the call is killed from outside.
        cpu_seconds: processor time of each process of the call; ``None`` takes ``wall_seconds``.
        memory_mb: MiB of memory on top of the interpreter with its libraries: of each process, and of the whole call
            where control groups can be used.
        processes: processes and threads at a time, the first included.
        output_bytes: bytes printed, standard output and standard error together.
        disk_mb: MiB of files under the call's own ``/tmp``, the only place to write; they count as memory too.

    Raises:
        ValueError: a limit is out of range.
    """

    wall_seconds: Above0 = 30.0
    cpu_seconds: Positive | None = None
    memory_mb: Positive = 1024
    processes: Positive = 16
    output_bytes: Positive = 64 * 1024
    disk_mb: Positive = 16

    @property
    def cpu(self) -> int:
        """Processor seconds of each process, a whole number."""
        return self.cpu_seconds if self.cpu_seconds is not None else max(1, round(self.wall_seconds + 0.5))


@dataclass(frozen=True, slots=True)
class Execution:
    """What a snippet did.

    Attributes:
        stdout: what it printed, cut off at the limit; bytes that are not UTF-8 are replaced.
        error: empty if it ended well; else its traceback, or why it was ended.
        stderr: what it wrote to standard error, the traceback included.
        seconds: time by the clock, communication included.
    """

    stdout: str
    error: str = ""
    stderr: str = ""
    seconds: float = 0.0


class Session(ABC):
    """Calls that share their variables, for one episode; contained and limited like calls of their own."""

    @abstractmethod
    def run(self, code: str) -> Execution:
        """Run a snippet over the variables that earlier ones left.

        Where a limit kills the snippet, the variables are lost: the error says so, and the next call starts afresh.

        Args:
            code: Python source.

        Returns:
            What this snippet printed and how it ended.

        Raises:
            SandboxError: the sandbox cannot be used any more.
        """

    @abstractmethod
    def close(self) -> None:
        """End the session; its variables and files are gone. Harmless when repeated."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Sandbox(ABC):
    """Runs snippets, each contained: nothing of the host, of other calls or of the network is within reach.

    Args:
        limits: what one call may use.

    A subclass keeps its settings in public attributes, which are pickled, and its processes and connections in private
    ones, which :meth:`_reset` sets to their values before opening.

    Example::

        with open_sandbox() as sandbox:
            print(sandbox.run("print(6 * 7)").stdout)
    """

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self.limits = limits or SandboxLimits()
        self._reset()

    def _reset(self) -> None:
        """Set the private attributes to those of a sandbox that was never opened."""
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    @abstractmethod
    def open(self) -> None:
        """Start what has to be started, unless that was done; :meth:`run` does it by itself.

        Raises:
            SandboxError: it cannot be used here; the message says why and what to do.
        """

    @abstractmethod
    def run(self, code: str) -> Execution:
        """Run a snippet as a script of its own.

        Args:
            code: Python source.

        Returns:
            What it printed and how it ended. Nothing that a snippet does raises here.

        Raises:
            SandboxError: the sandbox cannot be used.
        """

    def session(self) -> Session:
        """Begin a session: calls that share their variables.

        Raises:
            SandboxError: this sandbox has no sessions, or cannot be used.
        """
        raise SandboxError(f"{type(self).__name__} has no sessions: give each call all the code that it needs")

    @abstractmethod
    def close(self) -> None:
        """End it with all its processes; the next :meth:`run` opens it again. Harmless when repeated."""

    def __enter__(self) -> Sandbox:
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def join_error(stderr: str, reason: str) -> str:
    """A traceback, if there is one, and the reason after it."""
    return "\n".join(part for part in (stderr.strip(), reason) if part)

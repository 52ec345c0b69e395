"""The pool's end of a worker process: starting it, talking to it, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection

from spear_lightning.environments.worker import Command, Ready, Release, Reply, StartFailed

START_SECONDS = 120.0  # to start an interpreter and make the first environment
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_LAUNCH = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*map(int, sys.argv[4:]))"
)


def start_helper(target: str, *arguments: int, own_session: bool = False) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a fresh interpreter of one thread that runs a function.

    Args:
        target: import path of a function; it is called with the descriptor of its end of a pipe, and ``arguments``.
        arguments: whole numbers.
        own_session: whether it leads a session and a process group of its own.

    Returns:
        The process, and this side's end of the pipe.
    """
    module, _, function = target.rpartition(".")
    ours, theirs = socket.socketpair()
    with theirs:
        path = json.dumps([str(path) for path in sys.path])
        numbers = map(str, (theirs.fileno(), *arguments))
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, path, module, function, *numbers],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what engines print must not mix with the program's own output
            env={**os.environ, **_SINGLE_THREAD},
            start_new_session=own_session,
        )
    return process, Connection(ours.detach())


class WorkerLostError(Exception):
    """A worker is gone or must go; the message says why."""


class WorkerProcess:
    """The pool's end of one worker process; the process starts at once.

    Args:
        number: of the worker in its pool.
        suite: the pickled task suite.

    Attributes:
        ready: whether it has made its first environment.
        pending: by slot, the serial number of the command that it is answering.
        running: slots with an episode.
        deadline: monotonic time at which it is taken to hang.
    """

    def __init__(self, number: int, suite: bytes) -> None:
        self.number = number
        self.ready = False
        self.pending: dict[int, int] = {}
        self.running: set[int] = set()
        self.deadline = 0.0
        # In a session of its own, so that it can be killed together with what it started.
        target = "spear_lightning.environments.worker.main"
        self.process, self.connection = start_helper(target, os.getpid(), own_session=True)
        # A stopped worker must not block this process in a full pipe: reading and writing give up too.
        limit = struct.pack("ll", int(START_SECONDS), 0)
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        with contextlib.suppress(OSError):  # a worker that is gone already is noticed when it is read from
            self.connection.send_bytes(suite)

    def send(self, commands: list[Command | Release]) -> None:
        """Send a batch of commands.

        Raises:
            WorkerLostError: the worker is gone.
        """
        try:
            self.connection.send(commands)
        except OSError as error:
            raise WorkerLostError(self.cause()) from error

    def receive(self) -> Ready | StartFailed | list[Reply]:
        """The next message of the worker (blocks if there is none).

        Raises:
            WorkerLostError: the worker is gone.
        """
        try:
            message: Ready | StartFailed | list[Reply] = self.connection.recv()
        except Exception as error:  # end of file, or a message that was cut off when the process died
            raise WorkerLostError(self.cause()) from error
        return message

    def cause(self) -> str:
        """How the process ended, for people; ends it if it only closed its pipe."""
        self.kill()
        code = self.process.returncode
        if code >= 0:
            return f"environment worker died (exit code {code})"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"environment worker died ({signal.strsignal(-code)}{hint})"

    def stop(self) -> None:
        """Ask the worker to close its environments and end."""
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def kill(self) -> None:
        """End the process and everything it started, and wait for it."""
        if self.process.returncode is None:  # not waited for: the id still names this process
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        self.connection.close()

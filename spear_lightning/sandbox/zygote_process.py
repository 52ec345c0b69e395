"""The host's side of a zygote: start it, send it requests with a deadline, kill it."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import time
import weakref

from spear_lightning.sandbox.base import INSTALL_HINT, SandboxError
from spear_lightning.sandbox.cgroups import ControlGroup
from spear_lightning.sandbox.inside.wire import Outcome, Reply, Request, pack_request, unpack_reply

_START_SECONDS = 60.0
_GRACE_SECONDS = 3.0  # the zygote kills at the wall limit; if it does not answer so much later, the host kills both
_MAX_REPLY = 64 << 20
_OWN_PROCESSES = 3  # bwrap outside, bwrap inside, the zygote
_OWN_MEMORY = 256 << 20
_numbers = itertools.count()


class ZygoteLostError(Exception):
    """The zygote died or did not answer and was killed; the message says which."""


class ZygoteProcess:
    """One running zygote.

    Args:
        command: that starts it (see :func:`spear_lightning.sandbox.jail.command`).

    Attributes:
        owner: id of the process that started it and alone may use it.
        group: the control group that it is in.

    Raises:
        SandboxError: it does not start; the message is its own.
    """

    def __init__(self, command: list[str]) -> None:
        self.owner = os.getpid()
        self.group = ControlGroup(f"{self.owner}-{next(_numbers)}")
        # The pipes are non-blocking: nothing that happens inside can make this process wait for longer than it wants.
        self._process = subprocess.Popen(
            self.group.launcher(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is this process' to handle
        )
        self._finalizer = weakref.finalize(self, _end, self._process, self.group, self.owner)
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._stdin, self._stdout, self._stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
        for descriptor in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(descriptor, False)
        try:
            ready = self._receive(time.monotonic() + _START_SECONDS)
        except ZygoteLostError as error:
            said = self._said()
            self.close()
            raise SandboxError(f"the sandbox does not start: {said or error}. {INSTALL_HINT}") from error
        if ready.outcome != Outcome.READY:
            self.close()
            raise SandboxError("the sandbox does not start: it speaks another protocol")

    def alive(self) -> bool:
        """Whether it still runs, and is this process' own: a fork has its parent's pipes, but not its zygote."""
        return self.owner == os.getpid() and self._process.poll() is None

    def limit(self, processes: int, memory: int) -> None:
        """Set what all calls together may use where control groups can be used: processes, and bytes of memory."""
        self.group.limit(processes + _OWN_PROCESSES, memory + _OWN_MEMORY)

    def ask(self, request: Request, wall: float) -> Reply:
        """Send a request and wait for its reply.

        Args:
            request: what to do.
            wall: seconds that the zygote itself allows; a little more is waited.

        Raises:
            ZygoteLostError: it died, or it did not answer. It is to be closed then.
        """
        deadline = time.monotonic() + wall + _GRACE_SECONDS
        try:
            self._send(pack_request(request), deadline)
            return self._receive(deadline)
        except ValueError as error:
            raise ZygoteLostError(f"it answered nonsense ({error})") from error

    def close(self) -> None:
        """Kill it and everything inside, and wait for its end."""
        self._finalizer()

    def _send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._stdin, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._stdin, view) :]
            except OSError as error:
                raise ZygoteLostError(self._cause()) from error

    def _receive(self, deadline: float) -> Reply:
        data = bytearray()
        while (reply := unpack_reply(data)) is None:
            self._wait(self._stdout, select.POLLIN, deadline)
            piece = os.read(self._stdout, 1 << 20)
            data += piece
            if not piece or len(data) > _MAX_REPLY:
                raise ZygoteLostError(self._cause())
        return reply

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ZygoteLostError("it did not answer in time")

    def _cause(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            hint = " (out of memory?)" if code in (-signal.SIGKILL, 128 + signal.SIGKILL) else ""
            return f"it died with status {code}{hint}"
        return "it closed its pipe"

    def _said(self) -> str:
        """The last lines of its standard error, for an error message."""
        with contextlib.suppress(OSError):
            text = os.read(self._stderr, 1 << 16).decode("utf-8", "replace")
            return " ".join(text.strip().splitlines()[-3:])
        return ""


def _end(process: subprocess.Popen[bytes], group: ControlGroup, owner: int) -> None:
    """Kill ``bwrap``; the kernel ends everything inside with it (``--die-with-parent``, and the pid namespace)."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    if owner != os.getpid():
        return  # a fork of the owner: what runs is not ours to end
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
    group.remove()

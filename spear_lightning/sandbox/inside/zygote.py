"""The process that imports the libraries once and forks a cell for each call or session.

It talks to the host over its standard input and output. It never runs a line of a snippet; a cell can neither see it
nor signal it, and gets none of its descriptors.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import resource
import select
import signal
import sys
import time
from dataclasses import dataclass, field, replace

from . import cell, kernel
from .seccomp import build_filter
from .wire import Action, Outcome, Reply, Request, pack_reply, read_request, write_all

_PIECE = 1 << 16
_USER_IDS = 256  # a cell's user id is one of so many, so that the limits of live sessions are counted apart


@dataclass(slots=True)
class Cell:
    """A forked process and the pipes to it; ``code`` and ``done`` exist in a session only."""

    pid: int
    user: int
    watch: int
    stdout: int
    stderr: int
    code: int = -1
    done: int = -1


@dataclass(slots=True)
class Output:
    """What a cell wrote, cut off at a number of bytes over both streams."""

    room: int
    streams: dict[int, bytearray] = field(default_factory=dict)
    overflow: bool = False

    def take(self, descriptor: int) -> bool:
        """Read what is there; whether the stream may have more later."""
        try:
            data = os.read(descriptor, _PIECE)
        except BlockingIOError:
            return True
        if not data:
            return False
        self.overflow |= len(data) > self.room
        self.streams[descriptor] += data[: self.room]
        self.room = max(0, self.room - len(data))
        return True

    def drain(self) -> None:
        """Take what is in the pipes now. Bounded: a writer may be alive."""
        for descriptor in self.streams:
            for _ in range(64):
                before = len(self.streams[descriptor])
                if not self.take(descriptor) or len(self.streams[descriptor]) == before:
                    break

    def reply(self, outcome: Outcome, value: int, alive: bool) -> Reply:
        """The reply that carries it."""
        out, err = self.streams.values()
        return Reply(outcome, value, bytes(out), bytes(err), alive)


class Zygote:
    """Forks cells and watches over them from outside.

    Args:
        rules: the limits of a cell.
    """

    def __init__(self, rules: cell.Rules) -> None:
        self.rules = rules
        self.sessions: dict[int, Cell] = {}
        self.serial = 0
        self.home = os.pidfd_open(os.getpid())  # with it, setns returns to this pid namespace (Linux 5.8)

    def answer(self, request: Request) -> Reply:
        """Do what the host asks for."""
        if request.action == Action.END_SESSION:
            if request.session in self.sessions:
                self.end(self.sessions.pop(request.session))
            return Reply(Outcome.EXITED)
        if request.action == Action.RUN:
            started = self.fork(request.code, session=False)
            try:
                return self.watch(started, request, alone=True)
            finally:
                self.end(started)
        session = self.sessions.get(request.session) or self.fork(b"", session=True)
        self.sessions[request.session] = session
        self.signal_all(session, signal.SIGCONT)
        reply = self.watch(session, request, alone=False)
        if reply.alive:
            self.signal_all(session, signal.SIGSTOP)  # threads and processes that it left do not go on between calls
        else:
            self.end(self.sessions.pop(request.session))
        return reply

    def fork(self, code: bytes, session: bool) -> Cell:
        """Start a cell: at once with ``code``, or as a session that waits for code."""
        self.serial += 1
        user = self.rules.first_user + self.serial % _USER_IDS
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for name in ("stdout", "stderr", "code", "done")[: 4 if session else 2]:
                reading, writing = os.pipe()
                ours.append(writing if name == "code" else reading)
                theirs.append(reading if name == "code" else writing)
            kernel.unshare(kernel.NEW_PIDS)
            try:
                pid = os.fork()
                if pid == 0:
                    self._become(code, user, theirs)
            finally:
                kernel.setns(self.home, kernel.NEW_PIDS)
            try:
                watch = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
        except OSError:
            for descriptor in ours:
                os.close(descriptor)
            raise
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        return Cell(pid, user, watch, *ours)

    def _become(self, code: bytes, user: int, descriptors: list[int]) -> None:
        """In the child: never returns, whatever happens."""
        try:
            out, err, *channel = descriptors
            os.dup2(out, 1)
            os.dup2(err, 2)
            rules = replace(self.rules, cpu=self.rules.session_cpu) if channel else self.rules
            if not rules.privileged:  # all cells and the zygote count as one user here
                rules = replace(rules, processes=rules.processes * (1 + len(self.sessions)) + 2)
            cell.lock_in(rules, user, channel)
            if channel:
                cell.serve(*channel)
            cell.run_once(code)
        except BaseException as error:
            os.write(2, f"the sandbox could not be entered: {error}\n".encode())
        finally:
            os._exit(1)

    def watch(self, watched: Cell, request: Request, alone: bool) -> Reply:
        """Collect the output until the snippet is done or a limit is passed; then it is killed."""
        limit = time.monotonic() + request.wall
        output = Output(self.rules.output, {watched.stdout: bytearray(), watched.stderr: bytearray()})
        poll = select.poll()
        for descriptor in (watched.stdout, watched.stderr, watched.watch):
            poll.register(descriptor, select.POLLIN)
        waiting = memoryview(b"" if alone else len(request.code).to_bytes(4, "little") + request.code)
        if not alone:
            poll.register(watched.done, select.POLLIN)
            poll.register(watched.code, select.POLLOUT)
        outcome: Outcome | None = None
        while outcome is None:
            left = limit - time.monotonic()
            events = dict(poll.poll(max(0.0, left) * 1000))
            if watched.code in events:
                try:
                    waiting = waiting[os.write(watched.code, waiting) :]
                except BlockingIOError:
                    pass
                except OSError:  # the session closed its end: there is nobody to run this
                    waiting = waiting[:0]
                if not waiting:
                    poll.unregister(watched.code)
            for descriptor in (watched.stdout, watched.stderr):
                if descriptor in events and not output.take(descriptor):
                    poll.unregister(descriptor)
            if output.overflow:
                outcome = Outcome.OUTPUT
            elif watched.watch in events or watched.done in events:
                outcome = Outcome.EXITED
            elif left <= 0:
                outcome = Outcome.WALL
        if outcome == Outcome.EXITED and not alone and watched.watch not in events:
            status = os.read(watched.done, 1)
            output.drain()
            outcome, alive = (Outcome.OUTPUT, False) if output.overflow else (outcome, bool(status))
            return output.reply(outcome, status[0] if status else 1, alive)
        if outcome != Outcome.EXITED:
            os.kill(watched.pid, signal.SIGKILL)
        return self._ended(watched, outcome, output)

    def _ended(self, watched: Cell, outcome: Outcome, output: Output) -> Reply:
        """What became of a cell that ended or was killed. The kernel reports it once all its processes are gone."""
        _, status, usage = os.wait4(watched.pid, 0)
        watched.pid = 0
        output.drain()
        if outcome == Outcome.EXITED and output.overflow:
            outcome = Outcome.OUTPUT
        value = os.waitstatus_to_exitcode(status)
        if outcome == Outcome.EXITED and value < 0:
            cpu = self.rules.cpu if watched.code < 0 else self.rules.session_cpu
            # The limit is counted in ticks, this is exact time: on a busy machine as little as 0.6 of it.
            killed_for_time = -value == signal.SIGKILL and usage.ru_utime + usage.ru_stime >= cpu / 2
            outcome = Outcome.CPU if killed_for_time else Outcome.SIGNALLED
        return output.reply(outcome, abs(value), alive=False)

    def end(self, ended: Cell) -> None:
        """Kill a cell that may still live, and take back what belonged to it."""
        if ended.pid:
            os.kill(ended.pid, signal.SIGKILL)
            os.waitpid(ended.pid, 0)
        for descriptor in (ended.watch, ended.stdout, ended.stderr, ended.code, ended.done):
            if descriptor >= 0:
                os.close(descriptor)

    def signal_all(self, session: Cell, number: signal.Signals) -> None:
        """Send a signal to all processes of a session; only to its first where cells have no user ids of their own."""
        os.kill(session.pid, number)
        if not self.rules.privileged:
            return
        # As another effective user, without capabilities, "everybody" means exactly the processes of that user.
        os.setresuid(-1, session.user, -1)
        try:
            os.kill(-1, number)
        except (ProcessLookupError, PermissionError):
            pass
        finally:
            os.setresuid(-1, 0, -1)


def main(arguments: list[str]) -> None:
    """Import the libraries, report ready, then serve the host until it closes its end.

    Args:
        arguments: one JSON object: the fields of :class:`~.cell.Rules` but the filter, ``preload`` (names of modules)
            and ``own_path`` (this package's folder).
    """
    settings = json.loads(arguments[0])
    from_host, to_host = os.dup(0), os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # whatever a library prints while it is imported is no message
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in settings.pop("preload"):
        importlib.import_module(name)
    sys.path.remove(settings.pop("own_path"))
    random.seed(0)  # every call begins with the same random numbers, so that an episode can be repeated
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    os.register_at_fork(after_in_child=lambda: random.seed(0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a session that waits takes five
    settings["memory"] += kernel.address_space()
    zygote = Zygote(cell.Rules(**settings, seccomp=build_filter()))
    gc.collect()
    gc.freeze()  # a collection in a cell does not touch, and so copy, what all cells share
    write_all(to_host, pack_reply(Reply(Outcome.READY)))
    while (request := read_request(from_host)) is not None:
        try:
            reply = zygote.answer(request)
        except (OSError, MemoryError) as error:
            reply = Reply(Outcome.REFUSED, stderr=str(error).encode())
        write_all(to_host, pack_reply(reply))

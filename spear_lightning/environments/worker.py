"""The body of an environment worker process: holds environments, obeys commands, dies with its parent.

A worker is started as a fresh interpreter (``python -c``), not through :mod:`multiprocessing`: spawned multiprocessing
children import the parent's main module again, and with it torch and Lightning, which here would cost seconds and
hundreds of megabytes per worker. This module therefore imports nothing heavier than Gymnasium.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import gymnasium

from spear_lightning.environments.base import Observation, Task, TaskSuite

_HOLD_SECONDS = 0.005  # that a finished answer waits for others to travel with
_PARENT_POLL_SECONDS = 5.0
_MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker made its first environment and takes commands."""


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The worker cannot make environments; ``message`` says why."""

    message: str
    details: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the command number ``serial``; ``details`` is a traceback where the environment raised."""

    serial: int
    slot: int
    observation: Observation
    details: str = ""


@dataclass(frozen=True, slots=True)
class Reset:
    """Begin an episode of ``task`` in ``slot``."""

    serial: int
    slot: int
    task: Task

    def apply(self, bench: Bench) -> Observation:
        """Run the command on the worker's environments."""
        environment = bench.environment(self.slot)
        text, info = environment.reset(seed=self.task.seed, options={"task": self.task.id})
        return observe(text, info)


@dataclass(frozen=True, slots=True)
class Step:
    """Send ``action`` to the episode in ``slot``."""

    serial: int
    slot: int
    action: str

    def apply(self, bench: Bench) -> Observation:
        """Run the command on the worker's environments."""
        text, reward, terminated, truncated, info = bench.environment(self.slot).step(self.action)
        return observe(text, info, float(reward), bool(terminated), bool(truncated))


@dataclass(frozen=True, slots=True)
class Release:
    """The slot is not needed for now: its environment may serve another one."""

    slot: int


Command = Reset | Step


@dataclass(slots=True)
class Bench:
    """The environments of one worker: those in use by slot, and idle ones to be reused."""

    suite: TaskSuite
    used: dict[int, gymnasium.Env[Any, Any]] = field(default_factory=dict)
    idle: list[gymnasium.Env[Any, Any]] = field(default_factory=list)

    def environment(self, slot: int) -> gymnasium.Env[Any, Any]:
        """The environment of ``slot``: its own, else an idle one, else a new one."""
        if slot not in self.used:
            self.used[slot] = self.idle.pop() if self.idle else self.suite.make()
        return self.used[slot]

    def release(self, slot: int) -> None:
        """Give the environment of ``slot`` back for reuse."""
        if slot in self.used:
            self.idle.append(self.used.pop(slot))

    def discard(self, slot: int) -> None:
        """Throw the environment of ``slot`` away (it raised: its state cannot be trusted)."""
        environment = self.used.pop(slot, None)
        if environment is not None:
            with contextlib.suppress(Exception):
                environment.close()

    def close(self) -> None:
        """Close every environment."""
        for environment in [*self.used.values(), *self.idle]:
            with contextlib.suppress(Exception):
                environment.close()


def observe(
    text: object, info: Mapping[str, Any], reward: float = 0.0, terminated: bool = False, truncated: bool = False
) -> Observation:
    """What a Gymnasium environment answered, as an :class:`Observation` of plain values.

    Raises:
        TypeError: the observation is not text.
        ValueError: the reward is not a finite number.
    """
    if not isinstance(text, str):
        raise TypeError(f"observations must be text (str), the environment gave {type(text).__name__}")
    if not math.isfinite(reward):
        raise ValueError(f"the environment gave the reward {reward}, which is not finite")
    return Observation(
        text=str(text),
        admissible=tuple(str(action) for action in info.get("admissible_actions") or ()),
        reward=reward,
        won=bool(info.get("won", False)),
        terminated=terminated,
        truncated=truncated,
        anchor=str(info.get("anchor") or text),
        task=str(info.get("task") or ""),
        answer=str(info.get("answer") or ""),
    )


def obey(bench: Bench, command: Command) -> Reply:
    """Run a command; an environment that raises gives an aborted observation and is thrown away."""
    try:
        return Reply(command.serial, command.slot, command.apply(bench))
    except BaseException as error:  # not only Exception: an environment that calls sys.exit() must not end the others
        bench.discard(command.slot)
        reason = f"environment raised {describe(error)}"
        return Reply(command.serial, command.slot, Observation("", aborted=reason), traceback.format_exc())


def describe(error: BaseException) -> str:
    """Type and message of an exception, on one line of bounded length."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    return " ".join(text.split())[:_MAX_REASON_CHARACTERS]


def die() -> None:
    """End this process at once, with whatever processes its environments started (it leads its own group)."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


class Outbox:
    """Sends answers: together where they come fast, and none held back by a slow one behind it.

    Args:
        connection: to the pool.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._replies: list[Reply] = []
        self._lock = threading.Lock()
        self._filled = threading.Event()
        threading.Thread(target=self._send_late_ones, daemon=True).start()

    def put(self, reply: Reply) -> None:
        """Have an answer sent soon."""
        with self._lock:
            self._replies.append(reply)
        self._filled.set()

    def flush(self) -> None:
        """Send what is there now."""
        with self._lock:
            replies, self._replies = self._replies, []
            self._filled.clear()
            if replies:
                self._connection.send(replies)

    def _send_late_ones(self) -> None:
        """Send what is still there a moment after it came, while the environment of another one is stepped."""
        with contextlib.suppress(OSError):  # the pool is gone: the listener ends this process
            while self._filled.wait():
                time.sleep(_HOLD_SECONDS)
                self.flush()


def listen(connection: Connection, inbox: queue.SimpleQueue[list[Any] | None], parent: int) -> None:
    """Put what arrives into ``inbox``; when the parent is gone, end the process even in the middle of a step."""
    try:
        while True:
            while not connection.poll(_PARENT_POLL_SECONDS):
                # Normally the end of the pipe tells; not so when a fork of the parent still holds its other end.
                if os.getppid() != parent:
                    die()
            message = connection.recv()
            inbox.put(message)
            if message is None:
                return
    except (EOFError, OSError):
        die()


def main(descriptor: int, parent: int) -> None:
    """Serve commands from the pipe ``descriptor`` until told to stop or the process ``parent`` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the pool asks where a hanging worker hangs before it kills it
    connection = Connection(descriptor)
    try:
        suite: TaskSuite = connection.recv()
        inbox: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=listen, args=(connection, inbox, parent), daemon=True).start()
        bench = Bench(suite, idle=[suite.make()])  # a suite that cannot make any is found out at the start
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(StartFailed(describe(error), traceback.format_exc()))
        return
    connection.send(Ready())
    outbox = Outbox(connection)
    while (commands := inbox.get()) is not None:
        for command in commands:
            if isinstance(command, Release):
                bench.release(command.slot)
            else:
                outbox.put(obey(bench, command))
        outbox.flush()
    bench.close()

"""Many text environments in a few worker processes, stepped together, surviving whatever an environment does.

The pool keeps no engine in the training process. An episode lives in a numbered *slot*; a slot always belongs to the
same worker. Whatever goes wrong with an episode — its environment raises, hangs, or takes its whole process down — it
comes back as ``Observation(aborted=reason)``, the broken part is replaced, and the other episodes go on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import signal
import subprocess
import time
import weakref
from collections.abc import Iterable, Mapping
from multiprocessing.connection import wait
from typing import Any

from spear_lightning.environments.base import Observation, Task, TaskSuite
from spear_lightning.environments.worker import Command, Ready, Release, Reply, Reset, StartFailed, Step
from spear_lightning.environments.worker_process import START_SECONDS, WorkerLostError, WorkerProcess
from spear_lightning.utils.ranges import Above0, Positive, in_range

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 5.0
_MAX_LOSSES = 5  # workers lost in a row without one good observation
_MAX_FAILURES = 100  # environments that raised in a row without one good observation


class EnvironmentPoolError(RuntimeError):
    """The pool cannot play at all: workers do not start, or everything fails again and again."""


@in_range
class EnvironmentPool:
    """Environments of one suite in worker processes, addressed by slot.

    Args:
        suite: makes the environments; must be picklable, and its class importable by a fresh interpreter.
        workers: number of processes. Slot ``s`` lives in worker ``s % workers``.
        step_timeout: seconds that a worker may take for one step or reset before it is taken to hang.

    The workers start at the first reset, or when the pool is entered as a context manager. They are killed when the
    pool is garbage-collected, and end by themselves when this process dies, however it dies.

    Example::

        with EnvironmentPool(suite, workers=2) as pool:
            observations = pool.reset({slot: task for slot, task in enumerate(suite.tasks("train")[:64])})
            observations = pool.step({slot: "look" for slot in observations})

    Raises:
        ValueError: an argument is out of range, or the suite cannot be pickled.
    """

    def __init__(self, suite: TaskSuite, workers: Positive = 2, step_timeout: Above0 = 60.0) -> None:
        self.suite = suite
        self.step_timeout = step_timeout
        self._suite = _pickled(suite)
        self._size = workers
        self._workers: list[WorkerProcess] = []
        self._serials = itertools.count()
        self._arrived: dict[int, Observation] = {}
        self._lost: dict[int, str] = {}  # episodes that went down with a worker while nothing was asked of them
        self._losses = 0
        self._failures = 0
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __enter__(self) -> EnvironmentPool:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an EnvironmentPool holds processes and cannot be pickled; send its suite instead")

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    @property
    def pending(self) -> frozenset[int]:
        """Slots with a command that has not been received yet."""
        return frozenset(self._arrived).union(*(worker.pending for worker in self._workers))

    def start(self) -> None:
        """Start the workers, if they are not running, and wait until each made its first environment.

        Raises:
            EnvironmentPoolError: a worker cannot start; the message is the worker's own.
        """
        if self._workers:
            return
        self._workers.extend(WorkerProcess(number, self._suite) for number in range(self._size))
        while waiting := [worker for worker in self._workers if not worker.ready]:
            for worker in waiting:
                worker.deadline = worker.deadline or time.monotonic() + START_SECONDS
            self._serve(waiting)

    def reset(self, tasks: Mapping[int, Task]) -> dict[int, Observation]:
        """Begin an episode in each slot and wait for all of them.

        Args:
            tasks: by slot. An episode that still runs in a slot is given up.

        Returns:
            The first observation of each slot; ``aborted`` says why an episode could not begin.

        Raises:
            EnvironmentPoolError: nothing works any more (see the class).
        """
        self.send_reset(tasks)
        return self.gather(tasks)

    def step(self, actions: Mapping[int, str]) -> dict[int, Observation]:
        """Send an action to each slot and wait for all answers.

        Args:
            actions: by slot; any text.

        Returns:
            What each environment answered.

        Raises:
            ValueError: there is no running episode in a slot.
            EnvironmentPoolError: nothing works any more (see the class).
        """
        self.send_step(actions)
        return self.gather(actions)

    def send_reset(self, tasks: Mapping[int, Task]) -> None:
        """Like :meth:`reset`, without waiting: :meth:`receive` or :meth:`gather` gives the observations."""
        self.start()
        self._check_free(tasks)
        self._notice_deaths()
        for slot in tasks:
            self._lost.pop(slot, None)
        self._send([Reset(next(self._serials), slot, task) for slot, task in tasks.items()])

    def send_step(self, actions: Mapping[int, str]) -> None:
        """Like :meth:`step`, without waiting: :meth:`receive` or :meth:`gather` gives the observations."""
        self._check_free(actions)
        self._notice_deaths()
        for slot in actions:
            if slot in self._lost:
                self._arrived[slot] = Observation("", aborted=self._lost.pop(slot))
            elif not self._workers or slot not in self._worker(slot).running:
                raise ValueError(f"no episode is running in slot {slot}: reset it first")
        steps = [Step(next(self._serials), slot, text) for slot, text in actions.items() if slot not in self._arrived]
        self._send(steps)

    def receive(self, timeout: float | None = None) -> dict[int, Observation]:
        """The observations that have arrived since, by slot.

        Args:
            timeout: seconds to wait for at least one; ``None`` waits as long as it takes, 0 does not wait.

        Returns:
            Empty only when nothing is pending or the time is over.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while not self._arrived:
            busy = [worker for worker in self._workers if worker.pending]
            remaining = None if end is None else end - time.monotonic()
            if not busy or not self._serve(busy, remaining) or (remaining is not None and remaining <= 0):
                break
        arrived, self._arrived = self._arrived, {}
        return arrived

    def gather(self, slots: Iterable[int]) -> dict[int, Observation]:
        """Wait for the answers of exactly these slots; what arrives for others is kept for later.

        Raises:
            ValueError: nothing was sent to one of them.
        """
        wanted = list(slots)
        if unasked := sorted(set(wanted).difference(self.pending)):
            raise ValueError(f"slots {unasked} have no answer outstanding: send them something first")
        while any(slot not in self._arrived for slot in wanted):
            self._serve([worker for worker in self._workers if worker.pending])
        return {slot: self._arrived.pop(slot) for slot in wanted}

    def release(self, slots: Iterable[int]) -> None:
        """The episodes in these slots are over: their environments may be reused by other slots."""
        commands: list[Command | Release] = []
        for slot in slots:
            self._lost.pop(slot, None)
            self._arrived.pop(slot, None)
            if self._workers:
                worker = self._worker(slot)
                worker.pending.pop(slot, None)  # its answer, if one comes, is nobody's
                if slot in worker.running:
                    worker.running.discard(slot)
                    commands.append(Release(slot))
        self._send(commands)

    def close(self) -> None:
        """End all workers. The pool starts again at the next reset."""
        workers, self._workers[:] = list(self._workers), []
        for worker in workers:
            worker.stop()
        end = time.monotonic() + _CLOSE_SECONDS
        for worker in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # A worker in the middle of something is not waited for.
                worker.process.wait(0.0 if worker.pending or not worker.ready else max(0.0, end - time.monotonic()))
            worker.kill()
        self._arrived.clear()
        self._lost.clear()

    def _worker(self, slot: int) -> WorkerProcess:
        return self._workers[slot % self._size]

    def _check_free(self, slots: Iterable[int]) -> None:
        taken = self.pending.intersection(slots)
        if taken:
            raise ValueError(f"slots {sorted(taken)} have an answer outstanding: receive it first")

    def _send(self, commands: Iterable[Command | Release]) -> None:
        batches: dict[int, list[Command | Release]] = {}
        for command in commands:
            batches.setdefault(command.slot % self._size, []).append(command)
        for number, batch in batches.items():
            worker = self._workers[number]
            if not worker.pending:  # one that owes an answer gets no more time for it by being asked for others
                worker.deadline = time.monotonic() + (self.step_timeout if worker.ready else START_SECONDS)
            for command in batch:
                if not isinstance(command, Release):
                    worker.pending[command.slot] = command.serial
                    worker.running.add(command.slot)
            try:
                worker.send(batch)
            except WorkerLostError as error:
                self._replace(worker, str(error))

    def _notice_deaths(self) -> None:
        """Replace idle workers that died since, so that new episodes do not begin in a dead process."""
        while self._serve([worker for worker in self._workers if not worker.pending], 0.0):
            pass

    def _serve(self, workers: list[WorkerProcess], timeout: float | None = None) -> bool:
        """Take one message from each worker that has one; wait for the first. Whether anything happened."""
        now = time.monotonic()
        limits = [worker.deadline - now for worker in workers if worker.pending or not worker.ready]
        limits += [] if timeout is None else [timeout]
        by_connection: dict[Any, WorkerProcess] = {worker.connection: worker for worker in workers}
        readable = wait(list(by_connection), max(0.0, min(limits)) if limits else 0.0)
        for connection in readable:
            worker = by_connection[connection]
            try:
                self._take(worker, worker.receive())
            except WorkerLostError as error:
                self._replace(worker, str(error))
        overdue = [worker for worker in workers if worker.connection not in readable and self._overdue(worker)]
        for worker in overdue:
            with contextlib.suppress(OSError):
                os.kill(worker.process.pid, signal.SIGUSR1)  # prints where it hangs
                time.sleep(0.1)
            seconds = self.step_timeout if worker.ready else START_SECONDS
            self._replace(worker, f"environment worker gave no answer for {seconds:g} s (step_timeout)")
        return bool(readable or overdue)

    def _overdue(self, worker: WorkerProcess) -> bool:
        return bool(worker.pending or not worker.ready) and time.monotonic() >= worker.deadline

    def _take(self, worker: WorkerProcess, message: Ready | StartFailed | list[Reply]) -> None:
        if isinstance(message, StartFailed):
            logger.debug("%s", message.details)
            self.close()
            raise EnvironmentPoolError(
                f"environment workers cannot start: {type(self.suite).__name__}: {message.message}"
            )
        worker.deadline = time.monotonic() + self.step_timeout
        if isinstance(message, Ready):
            worker.ready = True
            return
        for reply in message:
            if worker.pending.get(reply.slot) != reply.serial:
                continue  # the slot was released or reset since
            del worker.pending[reply.slot]
            self._arrived[reply.slot] = reply.observation
            if reply.observation.aborted is None:
                self._losses = self._failures = 0
                continue
            worker.running.discard(reply.slot)
            logger.warning("slot %d aborted: %s", reply.slot, reply.observation.aborted)
            logger.debug("%s", reply.details)
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                self._give_up(f"{self._failures} times in a row", reply.observation.aborted)

    def _replace(self, worker: WorkerProcess, reason: str) -> None:
        worker.kill()
        logger.warning("%s: %d episodes aborted, starting another", reason, len(worker.running))
        for slot in worker.running:
            if slot in worker.pending:
                self._arrived[slot] = Observation("", aborted=reason)
            else:  # also if an answer of it waits to be taken: its next step finds no episode
                self._lost[slot] = reason
        self._losses += 1
        if self._losses >= _MAX_LOSSES:
            self._give_up(f"{self._losses} workers in a row were lost", reason)
        self._workers[worker.number] = WorkerProcess(worker.number, self._suite)
        self._workers[worker.number].deadline = time.monotonic() + START_SECONDS

    def _give_up(self, count: str, reason: str) -> None:
        self.close()
        raise EnvironmentPoolError(f"environments of {type(self.suite).__name__} fail, {count}: {reason}")


def _pickled(suite: TaskSuite) -> bytes:
    name = f"{type(suite).__module__}.{type(suite).__qualname__}"
    if type(suite).__module__ == "__main__":
        raise ValueError(f"{name} is defined in the program's main file: move it to a module that can be imported")
    try:
        return pickle.dumps(suite)
    except Exception as error:
        raise ValueError(f"the task suite {name} cannot be sent to worker processes: {error}") from error


def _kill_all(workers: list[WorkerProcess], owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner has copies of the objects, not the processes
        for worker in workers:
            worker.kill()

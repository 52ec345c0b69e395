"""Runs one arm with one seed: train, test, record. Whatever interrupts it, the next attempt goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison.plan import Comparison, Run, last_lines
from comparison.record import FailedRun, IncompleteRunError, RunRecord, load_record, read_evaluations, read_run, save
from spear_lightning.utils.atomic import write_atomically

Report = Callable[[str], None]

_POLL_SECONDS = 1.0
_LOG_LINES = 25


class RunFailedError(Exception):
    """A process of a run failed; the message says which, ``log`` holds the last it printed."""

    def __init__(self, message: str, log: list[str]) -> None:
        super().__init__(message)
        self.log = log


class InterruptedRunError(Exception):
    """The comparison was told to stop."""


@dataclass(frozen=True)
class _State:
    """What a run directory holds: training of which configuration, and whether it has come to its end."""

    digest: str
    trained: bool

    @classmethod
    def read(cls, path: Path) -> _State | None:
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Processes:
    """The processes that are running, so that all of them can be ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def stop(self) -> None:
        """End every process, and the workers it has started, and start no more."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                _end(process, signal.SIGTERM)

    @contextmanager
    def start(self, arguments: Sequence[str], log: Path, keep_open: int) -> Iterator[subprocess.Popen[bytes]]:
        """A process in a group of its own that prints to ``log``.

        Args:
            arguments: its command line.
            log: file that its output is appended to.
            keep_open: file descriptor that it inherits: a lock it holds is then held as long as the process lives.
        """
        with log.open("ab") as output:
            with self._lock:
                if self.stopped:
                    raise InterruptedRunError
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                    pass_fds=(keep_open,),
                )
                self._running.add(process)
            try:
                yield process
            finally:
                _end(process, signal.SIGKILL)  # whatever is left of the group
                process.wait()
                with self._lock:
                    self._running.discard(process)


def environment() -> dict[str, str]:
    """Variables of a run's processes: one thread each, so that runs side by side do not fight over cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120"}


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


@dataclass(frozen=True)
class Executor:
    """Brings runs to their records.

    Attributes:
        comparison: that the runs belong to.
        provenance: goes into every record.
        processes: that are running now.
        report: takes one line per event.
    """

    comparison: Comparison
    provenance: dict[str, Any]
    processes: Processes
    report: Report

    def record_path(self, run: Run) -> Path:
        """Where the record of ``run`` lies."""
        return self.comparison.output / f"{run.name}.json"

    def finished(self, run: Run) -> RunRecord | None:
        """The record of ``run``, if it was finished with this very configuration."""
        record = load_record(self.record_path(run))
        wanted = run.digest(self.comparison.temperatures)
        return record if record is not None and record.digest == wanted else None

    def execute(self, run: Run) -> RunRecord | FailedRun:
        """Train and test ``run`` and write its record; a failure is recorded too.

        Raises:
            InterruptedRunError: the comparison was told to stop; nothing is recorded.
        """
        directory = self.comparison.output / "runs" / run.name
        directory.mkdir(parents=True, exist_ok=True)
        record: RunRecord | FailedRun
        try:
            with _locked(directory / ".lock") as lock:
                self._train(run, directory, lock)
                tests = {
                    temperature: self._test(run, directory, temperature, lock) for temperature in self._temperatures
                }
                record = read_run(
                    directory,
                    tests,
                    arm=run.arm.name,
                    seed=run.seed,
                    digest=run.digest(self._temperatures),
                    provenance=self.provenance,
                )
        except InterruptedRunError:
            raise
        except Exception as error:  # whatever it is, the other runs go on
            expected = isinstance(error, (RunFailedError, IncompleteRunError))
            message = str(error) if expected else f"{type(error).__name__}: {error}"
            log = error.log if isinstance(error, RunFailedError) else []
            record = FailedRun(run.arm.name, run.seed, run.digest(self._temperatures), message, log)
        save(self.record_path(run), record)
        return record

    @property
    def _temperatures(self) -> tuple[str, ...]:
        return self.comparison.temperatures

    # --- training ----------------------------------------------------------------------------------------------------

    def _train(self, run: Run, directory: Path, lock: int) -> None:
        marker = directory / "state.json"
        state = _State.read(marker)
        checkpoint = last_checkpoint(directory)
        if state is None or state.digest != run.training_digest or checkpoint is None:
            # Nothing to go on from: no file of an earlier attempt may be taken for one of this.
            state, checkpoint = _State(run.training_digest, trained=False), None
            _clear(directory)
            write_atomically(marker, json.dumps(asdict(state)))
        if state.trained:
            return
        try:
            self._fit(run, directory, checkpoint, lock)
        except RunFailedError as error:
            if checkpoint is None:
                raise
            # The checkpoint itself may be what cannot be used: once more, from the start.
            self.report(f"{run.name}: failed when resumed ({error}); starting anew")
            _clear(directory)
            write_atomically(marker, json.dumps(asdict(state)))
            self._fit(run, directory, None, lock)
        write_atomically(marker, json.dumps(asdict(_State(run.training_digest, trained=True))))

    def _fit(self, run: Run, directory: Path, checkpoint: Path | None, lock: int) -> None:
        arguments = [*self.comparison.configuration(run.arm, run.seed), f"--run.directory={directory}"]
        if checkpoint is not None:
            # The evaluation before training is in the checkpoint; another now would be of a policy in mid-training.
            arguments += [f"--ckpt_path={checkpoint}", "--trainer.num_sanity_val_steps=0"]
        self.report(f"{run.name}: training" + (f", resumed from {checkpoint.name}" if checkpoint else ""))
        told = len(read_evaluations(directory)) if checkpoint else 0

        def news() -> None:
            nonlocal told
            evaluations = read_evaluations(directory)
            for iteration, successes, episodes in evaluations[told:]:
                when = f"after {iteration} iterations" if iteration else "before training"
                self.report(f"{run.name}: {successes / episodes:.1%} of {episodes} validation games {when}")
            told = max(told, len(evaluations))

        self._run(["fit", *arguments], directory / "fit.log", lock, news)

    # --- testing -----------------------------------------------------------------------------------------------------

    def _test(self, run: Run, directory: Path, temperature: str, lock: int) -> Path:
        checkpoint = last_checkpoint(directory)
        if checkpoint is None:
            raise IncompleteRunError(f"{directory} has no last.ckpt: training wrote no checkpoint")
        folder = directory / f"test-T{temperature}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        arguments = [
            *self.comparison.configuration(run.arm, run.seed),
            f"--data.evaluation.temperature={temperature}",
            f"--run.directory={folder}",
            f"--ckpt_path={checkpoint}",
        ]
        self._run(["test", *arguments], folder / "test.log", lock)
        return folder

    # --- processes ---------------------------------------------------------------------------------------------------

    def _run(self, arguments: Sequence[str], log: Path, lock: int, news: Callable[[], None] = lambda: None) -> None:
        with self.processes.start([*self.comparison.command, *arguments], log, lock) as process:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                news()
        if self.processes.stopped:
            raise InterruptedRunError
        if process.returncode:
            text = log.read_text(encoding="utf-8", errors="replace")
            lines = last_lines(text, _LOG_LINES).splitlines()
            raise RunFailedError(f"spear {arguments[0]} ended with status {process.returncode}", lines)
        news()


def last_checkpoint(directory: Path) -> Path | None:
    """The newest ``last.ckpt`` (a file, or a folder of shards) below a run's directory."""
    found = sorted(directory.glob("**/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a run's directory for this process and those it starts, also after this one has been killed."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailedError(
                f"another process is working in {path.parent} (a comparison that was killed leaves its runs behind): "
                "wait for it or end it",
                [],
            ) from None
        yield file.fileno()

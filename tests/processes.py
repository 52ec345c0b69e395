"""Processes that have their imports behind them.

What takes longest in a small run is importing torch, transformers and DeepSpeed. Here it is done once per test process,
in a server that everything else is forked from.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOAD = ["tests.preload"]


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A new process that calls a function, which must be importable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """Processes that train together, with what they print in files."""

    folder: Path
    processes: list[BaseProcess] = field(default_factory=list)

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join()

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def join(self, seconds: float = 280) -> list[int]:
        """Exit codes, once all have ended; what is left after the time is killed."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.join(max(0.1, deadline - time.monotonic()))
                assert process.exitcode is not None, f"still running after {seconds} s\n{self.printed()}"
        finally:
            self.kill()
        return [process.exitcode or 0 for process in self.processes]

    def printed(self, stream: str = "*") -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"rank-*.{stream}")))


def start_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> Ranks:
    """Start processes that Lightning takes for the ranks of one machine.

    Args:
        count: of ranks.
        function: that each calls.
        arguments: of the function.
        folder: for what they print.
        environment: further variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks, port = Ranks(folder), str(free_port())
    for rank in range(count):
        own = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        given = {**(own if count > 1 else {}), **(environment or {})}
        ranks.processes.append(start(_call, function, arguments, given, folder / f"rank-{rank}"))
    return ranks


def spear(arguments: Sequence[str]) -> None:
    """``spear`` with some arguments, as a function for :func:`start_ranks`."""
    from spear_lightning.cli.main import main

    main(list(arguments))


def _call(function: Callable[..., Any], arguments: Sequence[Any], environment: Mapping[str, str], log: Path) -> None:
    for number, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    function(*arguments)

"""Two hosts (network namespaces with a cable between them) train together, lose a rank, and lose each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, environment, spear_command
from tests.integration.hosts import INTERFACE, Hosts, enter, two_hosts, why_not
from tests.integration.runs import PLAIN, curve, zero
from tests.processes import Ranks, start_ranks
from tests.processes import spear as spear_main

TIMEOUT = 20  # seconds, of the run whose cable is cut; long enough for hosts that do not start at the same moment
REASON = why_not()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def settings(run: Path, *callbacks: dict[str, object], timeout: int = 120) -> dict[str, object]:
    """ZeRO-2, a rank on each host."""
    small = zero(2, timeout=f"00:{timeout // 60:02}:{timeout % 60:02}")
    few = {"trainer.devices": 1, "trainer.num_nodes": 2, "trainer.max_epochs": 2, "run.directory": str(run)}
    return {**small, **few, "trainer.callbacks": [*small["trainer.callbacks"], *callbacks]}


@contextmanager
def started(commands: list[list[str]], variables: list[dict[str, str]], log: Path) -> Iterator[list[subprocess.Popen]]:
    """A process on each host; ``log-0`` and ``log-1`` are what they print."""
    log.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    processes = []
    for number, (command, extra) in enumerate(zip(commands, variables, strict=True)):
        with (log / f"log-{number}").open("w") as file:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**environment(), "PATH": path, "GLOO_SOCKET_IFNAME": INTERFACE, **extra},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def logs(run: Path) -> list[str]:
    return [(run / f"log-{number}").read_text() for number in (0, 1)]


def by_torchrun(hosts: Hosts, run: Path, games: Path, changes: dict[str, object]) -> None:
    """The run by ``configs/launch/torchrun.sh``, until it ends well."""
    arguments = spear_command("fit", games, run, changes)[4:]
    commands = [hosts.on(number, ["configs/launch/torchrun.sh", *arguments]) for number in (0, 1)]
    variables = [
        {"NODES": "2", "PROCESSES": "1", "HEAD": f"{hosts.addresses[0]}:29400", "ADDRESS": address, "RESTARTS": "3"}
        for address in hosts.addresses
    ]
    with started(commands, variables, run) as processes:
        assert [process.wait(timeout=200) for process in processes] == [0, 0], "\n".join(logs(run))[-5000:]


def by_hand(hosts: Hosts, run: Path, games: Path, changes: dict[str, object]) -> list[Ranks]:
    """The run, started on each host as a launcher would, in processes that have their imports behind them."""
    line = spear_command("fit", games, run, changes)[3:]
    variables = {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": INTERFACE}
    return [
        start_ranks(
            1, spear_on, name, line, folder=run / f"host-{number}", environment={**variables, "NODE_RANK": str(number)}
        )
        for number, name in enumerate(hosts.names)
    ]


def spear_on(host: str, arguments: list[str]) -> None:
    """``spear`` on a host; called in a process of its own."""
    enter(host)
    spear_main(arguments)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def whole(games_cache, tmp_path_factory) -> Path:
    """The uninterrupted run on two hosts."""
    run = tmp_path_factory.mktemp("whole")
    with two_hosts() as made:
        for ranks in by_hand(made, run, games_cache, settings(run)):
            assert ranks.join() == [0], ranks.printed()
    return run


def test_two_hosts_take_the_steps_of_one_process(spear, whole, tmp_path):
    spear("fit", {**PLAIN, "trainer.max_epochs": 2})
    mine, other = curve(whole), curve(tmp_path / "run")
    assert len(mine) == len(other) == 2
    assert sum(float(row["replay/used"]) for row in mine) > 0
    for row, expected in zip(mine, other, strict=True):
        for name in ("rollout/success", "reward/total", "update/grad_norm", "replay/size", "replay/used"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4), name


def test_a_killed_rank_is_started_again_and_the_run_is_the_uninterrupted_one(whole, hosts, games_cache, tmp_path):
    run = tmp_path / "run"
    strike = {"folder": str(run), "iteration": 2, "ranks": [1], "name": "SIGKILL"}
    changes = settings(run, {"class_path": "tests.integration.strike.Strike", "init_args": strike})
    by_torchrun(hosts, run, games_cache, changes)
    assert (run / "struck-SIGKILL-2-1").exists()
    survivor = logs(run)[0]
    assert "rank 0 has lost the connection to another rank" in survivor
    assert survivor.count("GLOBAL_RANK: 0") == 2, "one restart was enough"
    assert "checkpoints/iteration-00001" in survivor, "it went on, and did not start over"
    assert curve(run) == curve(whole)


def test_a_cut_cable_ends_the_run_within_the_time_out(hosts, games_cache, tmp_path):
    run = tmp_path / "run"
    changes = {**settings(run, timeout=TIMEOUT), "trainer.max_epochs": 999}
    both = by_hand(hosts, run, games_cache, changes)
    try:
        deadline = time.monotonic() + 150
        while not (run / "checkpoints/latest").exists():
            assert all(ranks.alive() for ranks in both), "".join(ranks.printed() for ranks in both)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        hosts.cut()
        for ranks in both:
            assert ranks.join(TIMEOUT + 30) == [1]
    finally:
        for ranks in both:
            ranks.kill()
    for number, ranks in enumerate(both):
        last = ranks.printed("err").strip().splitlines()[-1]
        for name in (f"rank {number} ", "time-out", "trainer.strategy.init_args.timeout", "GLOO_SOCKET_IFNAME"):
            assert name in last, ranks.printed()[-3000:]

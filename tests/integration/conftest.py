"""A small training run on the real engine: generated ALFWorld games, the shipped policy, a few iterations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.processes import Ranks, start_ranks
from tests.processes import spear as run_spear

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "data.environment.train": 8,
    "data.environment.validation": 8,
    "data.environment.test": 8,
    "data.workers": 1,
    "data.rollouts.tasks": 4,
    "data.rollouts.group_size": 4,
    "trainer.max_epochs": 3,
    "trainer.check_val_every_n_epoch": 1,
}


@pytest.fixture(scope="session")
def games_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the games of all small runs are kept (made once per test process)."""
    return tmp_path_factory.mktemp("games")


Spear = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def spear_in(games_cache: Path) -> Spear:
    """Runs ``spear`` in processes of its own: ``spear_in(folder, "fit", {"data.seed": 1}, "-c", "overlay.yaml")``."""

    def run(
        folder: Path, command: str, changes: dict[str, object] | None = None, *arguments: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        ranks = start_spear(command, games_cache, folder, changes, *arguments)
        code = next(filter(None, ranks.join()), 0)
        finished = subprocess.CompletedProcess(arguments, code, ranks.printed("out"), ranks.printed("err"))
        if check:
            assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished

    return run


@pytest.fixture
def spear(spear_in: Spear, tmp_path: Path) -> Spear:
    """The same in a folder of the test's own: ``spear("fit", {"data.seed": 1})``."""
    return partial(spear_in, tmp_path / "run")


def spear_command(
    command: str, games_cache: Path, directory: Path, changes: dict[str, object] | None = None, *arguments: str
) -> list[str]:
    """The command line of a small run; later ``arguments`` win over the small settings, ``changes`` over both."""
    own = {"run.directory": str(directory), "data.environment.cache_dir": str(games_cache)}
    # Who brings an environment brings all of it.
    given = {name: value for name, value in {**SMALL, **own}.items() if name.rpartition(".")[0] not in (changes or {})}
    settings = {**given, **(changes or {})}
    keys = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return [
        sys.executable,
        "-m",
        "spear_lightning.cli.main",
        command,
        "-c",
        "configs/quickstart.yaml",
        *arguments,
        *keys,
    ]


def start_spear(
    command: str, games_cache: Path, directory: Path, changes: dict[str, object] | None = None, *arguments: str
) -> Ranks:
    """The same command in processes with their imports behind them: as many ranks as ``trainer.devices`` says."""
    line = spear_command(command, games_cache, directory, changes, *arguments)[3:]
    count = int(str((changes or {}).get("trainer.devices", 1)))
    logs = directory.parent / f"{directory.name}-{command}-printed"
    return start_ranks(count, run_spear, line, folder=logs, environment={"COLUMNS": "120"})


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

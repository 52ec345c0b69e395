"""A small training run on the real engine: generated ALFWorld games, the shipped policy, a few iterations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "data.environment.train": 8,
    "data.environment.validation": 8,
    "data.environment.test": 8,
    "data.rollouts.tasks": 4,
    "data.rollouts.group_size": 4,
    "trainer.max_epochs": 3,
    "trainer.check_val_every_n_epoch": 1,
}


@pytest.fixture(scope="session")
def games_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the games of all small runs are kept (made once per test process)."""
    return tmp_path_factory.mktemp("games")


@pytest.fixture
def spear(games_cache: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``spear`` in a process of its own: ``spear("fit", {"data.seed": 1}, "-c", "overlay.yaml")``."""

    def run(
        command: str, changes: dict[str, object] | None = None, *arguments: str, check: bool = True, **options: object
    ) -> subprocess.CompletedProcess[str]:
        finished = subprocess.run(
            spear_command(command, games_cache, tmp_path / "run", changes, *arguments),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(),
            timeout=280,
            **options,  # type: ignore[call-overload]
        )
        if check:
            assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished

    return run


def spear_command(
    command: str, games_cache: Path, directory: Path, changes: dict[str, object] | None = None, *arguments: str
) -> list[str]:
    """The command line of a small run; later ``arguments`` win over the small settings, ``changes`` over both."""
    settings = {
        **SMALL,
        "run.directory": str(directory),
        "data.environment.cache_dir": str(games_cache),
        **(changes or {}),
    }
    keys = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return [sys.executable, "-m", "spear_lightning.cli", command, "-c", "configs/quickstart.yaml", *arguments, *keys]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

"""SIGTERM on several ranks, under every launcher: the iteration is finished and saved; the run goes on bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spear_lightning.checkpoint.manifest import newest_checkpoint, problem
from tests.integration.conftest import ROOT, environment, spear_command
from tests.integration.runs import curve, zero
from tests.launchers.slurm import requeued, start_job

pytestmark = pytest.mark.slow

ITERATIONS = 4


def settings(run: Path, iteration: int | None = None, ranks: tuple[int, ...] = ()) -> dict[str, object]:
    """Two ranks of ZeRO-2; some get SIGTERM in the middle of an iteration."""
    small = zero(2)
    strike = {"folder": str(run), "iteration": iteration, "ranks": ranks}
    callback = [{"class_path": "tests.integration.strike.Strike", "init_args": strike}] if iteration else []
    return {**small, "trainer.max_epochs": ITERATIONS, "trainer.callbacks": [*small["trainer.callbacks"], *callback]}


def check_saved(run: Path, iteration: int) -> None:
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert newest.name == f"iteration-{iteration:05d}"
    assert problem(newest, hashes=True) is None
    assert len(curve(run)) == iteration
    assert (run / "finished").exists() == (iteration == ITERATIONS)


def test_a_run_that_every_launcher_interrupts_is_the_uninterrupted_one(spear_in, games_cache, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    spear_in(whole, "fit", settings(whole))
    check_saved(whole, ITERATIONS)

    # Two processes, of which only the second is told.
    finished = spear_in(run, "fit", settings(run, 1, (1,)), "--ckpt_path", "last")
    assert "SIGTERM: saved after iteration 1" in finished.stdout + finished.stderr
    check_saved(run, 1)

    # torchrun starts both, both are told, and it does not take that for a failure.
    torchrun = subprocess.run(
        ["configs/launch/torchrun.sh", *spear_command("fit", games_cache, run, settings(run, 2, (0, 1)))[4:]],
        cwd=ROOT,
        env={
            **environment(),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PROCESSES": "2",
            "HEAD": "localhost:0",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert torchrun.returncode == 0, torchrun.stderr
    check_saved(run, 2)

    # SLURM starts both and signals both; the job asks to be requeued, and its second start finishes the run.
    for iteration in (3, ITERATIONS):
        job = start_job(run, spear_command("fit", games_cache, run, settings(run, 3, (0, 1)))[4:])
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
        assert requeued(run) == 1, output
        check_saved(run, iteration)
    assert f"finished: {ITERATIONS} iterations" in output
    assert curve(run) == curve(whole)

"""The launch files are sound, and the SLURM job comes back exactly when it should."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import ROOT
from tests.launchers.slurm import BIN, requeued, start_job

SCRIPTS = [*sorted((ROOT / "configs/launch").glob("*.s*")), *sorted(BIN.iterdir())]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


SAVES = "mkdir -p $run/checkpoints; echo iteration-00007 > $run/checkpoints/latest"


@pytest.mark.parametrize(
    ("spear", "status", "comes_back"),
    [
        (f"{SAVES}; echo 9 iterations > $run/finished", 0, False),
        (f"{SAVES}; exit 0", 0, True),  # ended by SIGTERM
        (f"{SAVES}; exit 3", 0, True),  # a rank has died after a checkpoint
        ("exit 3", 3, False),  # a mistake in the configuration would come back for ever
    ],
    ids=["finished", "told to end", "died on the way", "died at the start"],
)
def test_the_job_comes_back_until_training_has_finished(tmp_path, spear, status, comes_back):
    job = start_job(tmp_path / "run", ["-c", "x.yaml"], stand_in(tmp_path, spear))
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, requeued(tmp_path / "run")) == (status, comes_back), output


def test_a_cancelled_job_saves_and_does_not_come_back(tmp_path):
    spear = f"trap '{SAVES}; exit 0' TERM; touch $run/started-$SLURM_PROCID; while :; do sleep 0.05; done"
    job = start_job(tmp_path / "run", [], stand_in(tmp_path, f"mkdir -p $run; {spear}"))
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("run/started-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode == 0, output
    assert (tmp_path / "run/checkpoints/latest").exists(), "the ranks were told"
    assert requeued(tmp_path / "run") == 0


def stand_in(folder: Path, body: str) -> Path:
    """A folder with a program ``spear`` that does this in the run directory ``$run``."""
    (folder / "bin").mkdir()
    program = folder / "bin/spear"
    program.write_text(f"#!/bin/bash\nrun={folder / 'run'}\n{body}\n")
    program.chmod(0o755)
    return folder / "bin"


def test_the_job_that_slurm_is_asked_for():
    script = (ROOT / "configs/launch/spear.sbatch").read_text()
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(option.startswith("--signal=TERM@") for option in options), "to the ranks, not to the script"
    overlay = yaml.safe_load((ROOT / "configs/launch/slurm.yaml").read_text())
    assert overlay["trainer"]["plugins"][0]["init_args"] == {"auto_requeue": False}

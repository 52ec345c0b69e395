"""Runs ``configs/launch/spear.sbatch`` as SLURM would, with stand-ins for srun and scontrol: one node, two tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.integration.conftest import ROOT, environment

BIN = Path(__file__).resolve().parent / "bin"
SBATCH = ROOT / "configs/launch/spear.sbatch"


def start_job(run: Path, arguments: Sequence[str] = (), commands: Path | None = None) -> subprocess.Popen[str]:
    """Start the job once; what it asks of scontrol goes to ``scontrol.log`` beside the run's folder.

    Args:
        run: its folder.
        arguments: of ``spear fit``.
        commands: folder of programs that are found before any other, such as a stand-in for spear.
    """
    path = [str(BIN), str(Path(sys.executable).parent), os.environ["PATH"]]
    return subprocess.Popen(
        ["bash", str(SBATCH), str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={
            **environment(),
            "PATH": os.pathsep.join([str(commands), *path] if commands else path),
            "SCONTROL_LOG": str(run.with_name("scontrol.log")),
            "SLURM_JOB_ID": str(os.getpid()),  # Lightning makes the port out of it
            "SLURM_JOB_NAME": "spear",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NODELIST": "127.0.0.1",
        },
    )


def requeued(run: Path) -> int:
    """How often the job has asked to be started again."""
    log = run.with_name("scontrol.log")
    return len(log.read_text().splitlines()) if log.exists() else 0

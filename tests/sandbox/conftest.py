"""Sandboxes for the tests: one for each kind of bubblewrap set-up that this machine allows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from spear_lightning.sandbox import BubblewrapSandbox, SandboxError, SandboxLimits, jail

LIMITS = SandboxLimits(wall_seconds=0.5, cpu_seconds=2, memory_mb=192, processes=8, output_bytes=20_000, disk_mb=8)


def opened(limits: SandboxLimits = LIMITS, preload: tuple[str, ...] = ()) -> BubblewrapSandbox:
    """An opened bubblewrap sandbox, or the test is skipped with the reason."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    sandbox = BubblewrapSandbox(limits, preload=preload, self_test=False)
    try:
        sandbox.open()
    except SandboxError as error:
        pytest.skip(f"bubblewrap does not work here: {error}")
    return sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[BubblewrapSandbox]:
    made = opened(preload=("numpy", "sympy"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def user_sandbox() -> Iterator[BubblewrapSandbox]:
    """As an ordinary user has it: in a user namespace, cells and zygote with the same user id."""
    if os.geteuid() != 0:
        pytest.skip("not root: the other tests are in a user namespace already")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jail, "privileged", lambda: False)
        made = opened(preload=("numpy", "sympy"))
    yield made
    made.close()

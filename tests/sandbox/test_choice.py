"""The strongest sandbox that works is taken, one that does not contain is refused, and there is no way without."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from spear_lightning.sandbox import (
    AutoSandbox,
    BubblewrapSandbox,
    Execution,
    MontySandbox,
    Sandbox,
    SandboxError,
    SandboxLimits,
    jail,
    open_sandbox,
)
from spear_lightning.sandbox.selftest import _honest, verify
from tests.sandbox.conftest import LIMITS, opened

MODULE = "spear_lightning.sandbox"


class NoSandbox(Sandbox):
    """A bare subprocess, which is what must never be taken; it can be told to contain one thing or another."""

    def __init__(self, forbidden: str = "") -> None:
        super().__init__(SandboxLimits(wall_seconds=5, memory_mb=64, processes=3))
        self.forbidden = forbidden

    def open(self) -> None:
        pass

    def run(self, code: str) -> Execution:
        return self.call(code, 5.0)

    def call(self, code: str, wall: float) -> Execution:
        if self.forbidden and self.forbidden in code:
            return Execution("", "refused")
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=wall)
        except subprocess.TimeoutExpired as late:
            return Execution((late.stdout or b"").decode(), "too late")
        return Execution(done.stdout, done.stderr)

    def close(self) -> None:
        pass


def test_the_self_test_finds_each_way_out() -> None:
    bare = NoSandbox()
    with pytest.raises(SandboxError) as found:
        verify(bare, bare.call)
    for way in ("read a file", "wrote a file", "connected to a port", "signal processes", "sees processes"):
        assert way in str(found.value)
    assert "processes where 3 are allowed" in str(found.value)
    assert "took 128 MiB of memory" in str(found.value)
    assert "saw what an earlier one left" in str(found.value)
    os.unlink("/tmp/left")


def test_the_self_test_needs_honest_code_to_work() -> None:
    honest = NoSandbox("factorial")
    assert "an honest snippet failed" in next(_honest(honest.call))


def test_bubblewrap_is_taken_where_it_works() -> None:
    opened().close()  # or skip
    with open_sandbox(limits=LIMITS) as sandbox:
        assert isinstance(sandbox, AutoSandbox)
        assert isinstance(sandbox.chosen, BubblewrapSandbox)
        assert sandbox.run("import numpy\nprint(numpy.ones(3).sum())").stdout == "3.0\n"
        with sandbox.session() as session:
            session.run("x = 1")
            assert session.run("print(x)").stdout == "1\n"


def test_monty_is_taken_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pydantic_monty")
    monkeypatch.setattr(f"{MODULE}.jail.shutil.which", lambda name: None)
    with caplog.at_level(logging.WARNING), open_sandbox(limits=LIMITS) as sandbox:
        assert isinstance(sandbox.chosen, MontySandbox)
        assert sandbox.run("print(2)").stdout == "2\n"
    assert "bubblewrap is not installed" in caplog.text


def test_monty_is_taken_where_bubblewrap_does_not_contain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pydantic_monty")
    opened().close()  # or skip
    broken = shutil.copytree(jail._INSIDE, tmp_path / "inside", ignore=shutil.ignore_patterns("__pycache__"))
    source = (broken / "cell.py").read_text()
    (broken / "cell.py").write_text(source.replace("kernel.install_filter(rules.seccomp)", "pass"))
    tmp_path.chmod(0o755)
    command = jail.command
    monkeypatch.setattr(jail, "_INSIDE", broken)
    monkeypatch.setattr(jail, "command", lambda *given: [word for word in command(*given) if word != "--unshare-net"])
    with AutoSandbox(LIMITS) as sandbox:
        assert isinstance(sandbox.chosen, MontySandbox)
    assert "it connected to a port of this machine" in caplog.text


def test_none_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.jail.shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(SandboxError) as error:
        open_sandbox()
    assert "apt-get install bubblewrap" in str(error.value)
    assert "pip install 'spear-lightning[math]'" in str(error.value)
    assert "not run without one" in str(error.value)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'subprocess': choose one of auto, bubblewrap, monty, remote"):
        open_sandbox("subprocess")


def test_from_a_configuration(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--sandbox", type=Sandbox)
    parser.add_argument("--config", action="config")
    file = tmp_path / "sandbox.yaml"
    for name in ("AutoSandbox", "BubblewrapSandbox", "MontySandbox"):
        file.write_text(
            f"sandbox:\n  class_path: {MODULE}.{name}\n  init_args:\n    limits: {{wall_seconds: 5, memory_mb: 64}}\n"
        )
        made = parser.instantiate_classes(parser.parse_args(["--config", str(file)])).sandbox
        assert type(made).__name__ == name
        assert made.limits == SandboxLimits(wall_seconds=5, memory_mb=64)
        assert pickle.loads(pickle.dumps(made)).limits == made.limits

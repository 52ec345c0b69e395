"""Monty: contained and limited without any help of the system."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator

import pytest

from spear_lightning.sandbox import MontySandbox, Sandbox, SandboxLimits, open_sandbox
from tests.sandbox import hostile
from tests.sandbox.hostile import Hostile

LIMITS = SandboxLimits(wall_seconds=0.2, memory_mb=64, output_bytes=20_000)

pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")


@pytest.fixture(scope="module")
def monty() -> Iterator[Sandbox]:
    with open_sandbox("monty", LIMITS) as sandbox:
        yield sandbox


def test_honest_code(monty: MontySandbox) -> None:
    result = monty.run("import math\nprint(sum(i * i for i in range(10)), math.gcd(12, 18))")
    assert (result.stdout, result.error) == ("285 6\n", "")
    error = monty.run("print('before')\n1 / 0")
    assert error.stdout == "before\n"
    assert error.error.endswith("ZeroDivisionError: division by zero")


def test_what_it_lacks_is_named(monty: MontySandbox) -> None:
    assert "numpy" in monty.run("import numpy").error


@pytest.mark.parametrize("snippet", hostile.ALL, ids=lambda snippet: snippet.name)
def test_hostile_code_gets_nothing(monty: MontySandbox, snippet: Hostile) -> None:
    started = time.monotonic()
    code = snippet.code.replace("CANARY", "/etc/hostname").replace("PORT", "1").replace("HOST_PID", str(os.getpid()))
    result = monty.run(snippet.prelude + code)
    assert "ESCAPED" not in result.stdout
    assert time.monotonic() - started < 5
    assert monty.run("print(7 * 6)").stdout == "42\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("while True:\n    pass", "TimeoutError"),
        ("import time\ntime.sleep(50)", "TimeoutError"),
        ("x = [0] * 10**8", "MemoryError"),
        ("print('x' * 10**6)", "MemoryError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("#" * 2_000_000, "at most"),
    ],
)
def test_limits(monty: MontySandbox, code: str, error: str) -> None:
    assert error in monty.run(code).error


def test_calls_share_nothing_but_those_of_a_session(monty: MontySandbox) -> None:
    monty.run("x = 1")
    assert "NameError" in monty.run("print(x)").error
    with monty.session() as session, monty.session() as other:
        session.run("x = 1")
        assert "ZeroDivisionError" in session.run("x / 0").error
        assert session.run("print(x)").stdout == "1\n"
        assert "NameError" in other.run("print(x)").error
        assert session.run("while True: pass").error.endswith("the session's variables are lost")
        assert "NameError" in session.run("print(x)").error


def test_it_is_pickled_without_what_is_alive(monty: MontySandbox) -> None:
    with pickle.loads(pickle.dumps(monty)) as copy:
        assert copy.run("print(1)").stdout == "1\n"


def test_closed_it_opens_again() -> None:
    sandbox = MontySandbox(LIMITS, self_test=False)
    assert sandbox.run("print(1)").stdout == "1\n"
    sandbox.close()
    sandbox.close()
    assert sandbox.run("print(2)").stdout == "2\n"
    sandbox.close()

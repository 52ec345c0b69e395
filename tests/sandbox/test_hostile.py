"""Hostile snippets are contained, the host is as before, and the next honest call works in the same zygote."""

from __future__ import annotations

import os
import platform
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear_lightning.sandbox import BubblewrapSandbox, Execution
from tests.sandbox import hostile
from tests.sandbox.conftest import LIMITS
from tests.sandbox.hostile import Hostile

HONEST = """
import builtins, json, math, os, sys, numpy, sympy
print(math.factorial(10), json.dumps([1]), numpy.array([1, 2]).sum(), sympy.sqrt(16), hasattr(sys, "poisoned"))
print(os.listdir("/tmp"), os.listdir("/dev/shm"), builtins.print is print)
"""
HONEST_OUTPUT = "3628800 [1] 3 4 False\n[] [] True\n"
LATE_SECONDS = 3.0

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the snippets make system calls by x86_64 numbers"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    canary = tmp_path_factory.mktemp("host") / "canary"
    canary.write_text("the canary")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        listener.setblocking(False)
        yield {
            "CANARY": str(canary),
            "PORT": str(listener.getsockname()[1]),
            "HOST_PID": str(os.getpid()),
        }
        with pytest.raises(BlockingIOError):  # nobody came
            listener.accept()


def code_of(snippet: Hostile, host: dict[str, str]) -> str:
    code = snippet.prelude + snippet.code
    for name, value in host.items():
        code = code.replace(name, value)
    return code


def inside(sandbox: BubblewrapSandbox) -> list[str]:
    """Host process ids of everything below the zygote's outer process, by the host's own /proc."""
    assert sandbox._process is not None
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[entry.name] = entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
    found, wave = [], {str(sandbox._process._process.pid)}
    while wave := {child for child, parent in parents.items() if parent in wave}:
        found += sorted(wave)
    return found


def check_contained(sandbox: BubblewrapSandbox, snippet: Hostile, host: dict[str, str]) -> Execution:
    before = inside(sandbox)
    started = time.monotonic()
    result = sandbox.run(code_of(snippet, host))
    assert time.monotonic() - started < LIMITS.wall_seconds + LATE_SECONDS
    assert "ESCAPED" not in result.stdout
    said = result.stdout + result.error
    assert re.search(snippet.expect, said), said[-500:]
    assert len(result.stdout.encode()) <= 3 * LIMITS.output_bytes  # a byte that is no UTF-8 becomes three
    canary = Path(host["CANARY"])
    assert [path.name for path in canary.parent.iterdir()] == ["canary"]
    assert canary.read_text() == "the canary"
    honest = sandbox.run(HONEST)
    assert (honest.stdout, honest.error) == (HONEST_OUTPUT, "")
    assert inside(sandbox) == before, "a process outlived its call, or the zygote was replaced"
    return result


@pytest.mark.parametrize("snippet", hostile.ALL, ids=lambda snippet: snippet.name)
def test_it_is_contained(sandbox: BubblewrapSandbox, snippet: Hostile, host: dict[str, str]) -> None:
    check_contained(sandbox, snippet, host)


def test_random_numbers_are_the_same_in_every_call(sandbox: BubblewrapSandbox) -> None:
    assert len({sandbox.run("import numpy\nprint(numpy.random.rand())").stdout for _ in range(3)}) == 1


@pytest.mark.parametrize(
    "snippet", [*hostile.FILES, *hostile.NETWORK, *hostile.KERNEL, *hostile.POISON], ids=lambda snippet: snippet.name
)
def test_it_is_contained_in_a_user_namespace(
    user_sandbox: BubblewrapSandbox, snippet: Hostile, host: dict[str, str]
) -> None:
    check_contained(user_sandbox, snippet, host)

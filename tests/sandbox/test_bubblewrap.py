"""The bubblewrap sandbox with honest code: what a call gets, sessions, limits, and what becomes of its processes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spear_lightning.sandbox import BubblewrapSandbox, SandboxError, SandboxLimits
from tests.sandbox.conftest import LIMITS, opened
from tests.sandbox.test_hostile import inside

ROOT = Path(__file__).parents[2]


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(pids: list[str]) -> list[str]:
    return [pid for pid in pids if Path("/proc", pid).exists()]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[BubblewrapSandbox]:
    """One that starts fast: these tests end it again and again."""
    made = opened()
    yield made
    made.close()


class TestCalls:
    def test_output_and_libraries(self) -> None:
        code = "import sympy, numpy\nx = sympy.symbols('x')\nprint(sympy.solve(x**2 - 5*x + 6), numpy.eye(2).sum())"
        opened().close()  # or skip
        with BubblewrapSandbox() as sandbox:
            result = sandbox.run(code)
        assert (result.stdout, result.error, result.stderr) == ("[2, 3] 2.0\n", "", "")
        assert 0 < result.seconds < 5

    def test_a_script_has_the_usual_main_module(self, sandbox: BubblewrapSandbox) -> None:
        code = "import sys\nif __name__ == '__main__':\n    x = 3\n    print(sys.modules['__main__'].x)\n"
        assert sandbox.run(code).stdout == "3\n"

    def test_the_traceback_is_the_snippets_own(self, sandbox: BubblewrapSandbox) -> None:
        result = sandbox.run("def f(x):\n    return 1 / x\nprint('before')\nf(0)")
        assert result.stdout == "before\n"
        assert result.error.splitlines()[:3] == [
            "Traceback (most recent call last):",
            '  File "<code>", line 4, in <module>',
            "    f(0)",
        ]
        assert result.error.endswith("ZeroDivisionError: division by zero")
        assert "zygote" not in result.error

    def test_syntax_error(self, sandbox: BubblewrapSandbox) -> None:
        assert sandbox.run("print(").error.endswith("SyntaxError: '(' was never closed")

    def test_warnings_are_no_error(self, sandbox: BubblewrapSandbox) -> None:
        result = sandbox.run("import sys\nprint('careful', file=sys.stderr)")
        assert (result.stderr, result.error) == ("careful\n", "")

    def test_calls_are_equal(self, sandbox: BubblewrapSandbox) -> None:
        code = "import random\nprint(random.random(), list({'a', 'b', 'c', 'd'}))"
        assert len({sandbox.run(code).stdout for _ in range(3)}) == 1

    def test_asyncio_and_processes_work(self, sandbox: BubblewrapSandbox) -> None:
        assert sandbox.run("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))").stdout == "5\n"
        code = "import subprocess\nprint(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)"
        assert sandbox.run(code).stdout == "hi\n\n"

    def test_only_the_named_packages_exist(self, sandbox: BubblewrapSandbox) -> None:
        for name in ("torch", "spear_lightning", "pytest", "pip"):
            assert f"No module named '{name}'" in sandbox.run(f"import {name}").error

    def test_the_environment_is_empty(self, sandbox: BubblewrapSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_TOKEN", "secret")
        sandbox.close()
        assert "secret" not in sandbox.run("import os\nprint(os.environ)").stdout

    def test_long_code(self, sandbox: BubblewrapSandbox) -> None:
        assert sandbox.run("#" * 1_000_000 + "\nprint(1)").stdout == "1\n"
        assert "at most" in sandbox.run("#" * 10_000_000).error


class TestLimits:
    def test_wall(self, sandbox: BubblewrapSandbox) -> None:
        result = sandbox.run("print('so far', flush=True)\nwhile True: pass")
        assert (result.stdout, result.error) == ("so far\n", "killed after 0.5 s")

    def test_processor_time(self) -> None:
        with opened(SandboxLimits(wall_seconds=20, cpu_seconds=1)) as sandbox:
            result = sandbox.run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass")
        assert result.error == "killed after 1 s of processor time"

    def test_memory_on_top_of_the_libraries(self) -> None:
        some, more = LIMITS.memory_mb - 32, LIMITS.memory_mb + 8
        with opened(replace(LIMITS, wall_seconds=20)) as sandbox:  # a busy machine takes its time
            assert sandbox.run(f"x = b'x' * ({some} << 20)\nprint('fits')").stdout == "fits\n"
            assert "MemoryError" in sandbox.run(f"x = bytearray({more} << 20)").error

    def test_processes_exactly(self, sandbox: BubblewrapSandbox) -> None:
        code = (
            "import threading, time\nfor n in range({}):\n    threading.Thread(target=time.sleep, args=(0.1,)).start()"
        )
        assert sandbox.run(code.format(LIMITS.processes - 1)).error == ""
        assert "can't start new thread" in sandbox.run(code.format(LIMITS.processes)).error

    def test_memory_of_all_processes_together(self) -> None:
        # Each child keeps what it took until all have theirs or are dead, however slow the machine is.
        code = """
import os
reports, report = os.pipe()
hold, release = os.pipe()
pids = []
for n in range(6):
    pids.append(os.fork())
    if pids[-1] == 0:
        os.close(release)
        x = b"x" * (100 << 20)
        os.write(report, b"+")
        os.close(report)
        os.read(hold, 1)
        os._exit(0)
os.close(report)
dead, holding = {}, 0
os.set_blocking(reports, False)
while len(dead) + holding < len(pids):
    pid, status = os.waitpid(-1, os.WNOHANG)
    if pid:
        dead[pid] = status
    try:
        holding += len(os.read(reports, 1))
    except BlockingIOError:
        pass
os.close(release)
print(sorted(dead.get(pid) or os.waitpid(pid, 0)[1] for pid in pids))
"""
        with opened(SandboxLimits(wall_seconds=60, memory_mb=192, processes=8)) as sandbox:
            if "memory" not in sandbox.controllers:
                pytest.skip("no control group for memory can be made here")
            result = sandbox.run(code)
            assert "9]" in result.stdout or "signal 9" in result.error  # the kernel took at least one of them
            assert sandbox.run("print(1)").stdout == "1\n"

    def test_output_is_cut_off(self, sandbox: BubblewrapSandbox) -> None:
        result = sandbox.run(f"print('x' * {LIMITS.output_bytes + 1})")
        assert result.stdout == "x" * LIMITS.output_bytes
        assert result.error == f"killed: more than {LIMITS.output_bytes} bytes of output"

    @pytest.mark.parametrize(
        "name", ["wall_seconds", "cpu_seconds", "memory_mb", "processes", "output_bytes", "disk_mb"]
    )
    def test_a_limit_that_is_none(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"SandboxLimits.{name} must be"):
            SandboxLimits(**{name: 0})


class TestSessions:
    def test_variables_files_and_modules_stay(self, sandbox: BubblewrapSandbox) -> None:
        with sandbox.session() as session:
            session.run("import math\nx = 41\nopen('/tmp/f', 'w').write('kept')\ndef f(): return x + 1")
            assert session.run("print(f(), math.pi > 3, open('/tmp/f').read())").stdout == "42 True kept\n"
            assert "ZeroDivisionError" in session.run("x = 1 / 0").error
            assert session.run("print(x)").stdout == "41\n"
            assert session.run("raise SystemExit(2)").error == "exit code 1"
            assert session.run("print(x)").stdout == "41\n"

    def test_sessions_do_not_see_each_other(self, sandbox: BubblewrapSandbox) -> None:
        with sandbox.session() as one, sandbox.session() as two:
            one.run("x = 1\nopen('/tmp/f', 'w').write('x')")
            assert "NameError" in two.run("print(x)").error
            assert two.run("import os\nprint(os.listdir('/tmp'))").stdout == "[]\n"
            assert sandbox.run("import os\nprint(os.listdir('/tmp'))").stdout == "[]\n"
            assert one.run("print(x, open('/tmp/f').read())").stdout == "1 x\n"

    @pytest.mark.parametrize(
        "ending",
        ["while True: pass", "import os\nos._exit(0)", "print('x' * 10**6)", "import ctypes\nctypes.string_at(0)"],
    )
    def test_it_starts_afresh_after_it_was_ended(self, sandbox: BubblewrapSandbox, ending: str) -> None:
        with sandbox.session() as session:
            session.run("x = 1")
            assert session.run(ending).error.endswith("the session's variables are lost")
            assert "NameError" in session.run("print(x)").error
            session.run("x = 2")
            assert session.run("print(x)").stdout == "2\n"

    @pytest.mark.parametrize(
        "hostile",
        [
            "import os\nfor n in range(3, 100):\n    try: os.close(n)\n    except OSError: pass",
            "import os\nfor n in range(3, 100):\n    try: os.write(n, b'\\0' * 100)\n    except OSError: pass",
            "import os\nos.fork()",
            "import signal, os\nos.kill(os.getpid(), signal.SIGSTOP)\nos.close(1)",
            "import sys\nsys.stdout = None",
        ],
    )
    def test_a_session_spoils_only_itself(self, sandbox: BubblewrapSandbox, hostile: str) -> None:
        with sandbox.session() as other, sandbox.session() as session:
            other.run("x = 5")
            session.run(hostile)
            session.run("print(1)")
            assert other.run("print(x)").stdout == "5\n"
            assert sandbox.run("print(2)").stdout == "2\n"

    def test_it_rests_between_calls(self, sandbox: BubblewrapSandbox) -> None:
        code = """
import os, threading, time
count = 0
def work():
    global count
    while True:
        count += 1
        time.sleep(0.001)
threading.Thread(target=work, daemon=True).start()
if os.fork() == 0:
    while True: pass
time.sleep(0.05)
"""
        with sandbox.session() as session:
            session.run(code)
            if os.geteuid() == 0:
                spent = [processor_seconds(pid) for pid in inside(sandbox)]
            before = int(session.run("print(count)").stdout)
            time.sleep(0.3)
            if os.geteuid() == 0:
                assert sum(processor_seconds(pid) for pid in inside(sandbox)) - sum(spent) < 0.15
            assert int(session.run("print(count)").stdout) - before < 100
        assert sandbox.run("print(2)").stdout == "2\n"

    def test_closing_ends_its_processes(self, sandbox: BubblewrapSandbox) -> None:
        before = inside(sandbox)
        session = sandbox.session()
        session.run("import os, time\nfor n in range(3):\n    if os.fork() == 0: time.sleep(100)")
        assert len(inside(sandbox)) == len(before) + 4
        session.close()
        session.close()
        assert inside(sandbox) == before
        assert session.run("print(1)").stdout == "1\n"  # a fresh one
        session.close()

    def test_losing_the_zygote_is_told_to_every_session(self, sandbox: BubblewrapSandbox) -> None:
        with sandbox.session() as session:
            session.run("x = 1")
            sandbox.close()
            assert "variables were lost" in session.run("print(x)").error
            assert session.run("y = 1").error == ""


def processor_seconds(pid: str) -> float:
    try:
        fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class TestProcesses:
    def test_a_killed_zygote_is_replaced(self, sandbox: BubblewrapSandbox) -> None:
        for pid in reversed(inside(sandbox)):
            os.kill(int(pid), signal.SIGKILL)
        result = sandbox.run("print(1)")
        assert result.stdout == "1\n" or result.error.startswith("the sandbox was ended: it died")
        assert sandbox.run("print(2)").stdout == "2\n"

    def test_a_zygote_that_does_not_answer_is_killed(
        self, sandbox: BubblewrapSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("spear_lightning.sandbox.zygote_process._GRACE_SECONDS", 0.2)
        stopped = inside(sandbox)
        for pid in stopped:
            os.kill(int(pid), signal.SIGSTOP)
        result = sandbox.run("print(1)")
        assert "did not answer in time" in result.error
        assert result.seconds < 3
        assert eventually(lambda: not alive(stopped))
        assert sandbox.run("print(2)").stdout == "2\n"

    def test_closing_ends_everything_and_it_opens_again(self, sandbox: BubblewrapSandbox) -> None:
        sandbox.run("print(1)")
        pids, descriptors = inside(sandbox), len(os.listdir("/proc/self/fd"))
        assert len(pids) == 2  # bubblewrap as process 1, and the zygote
        sandbox.close()
        sandbox.close()
        assert eventually(lambda: not alive(pids))
        assert len(os.listdir("/proc/self/fd")) == descriptors - 3
        assert not left_groups()
        assert sandbox.run("print(2)").stdout == "2\n"

    def test_nothing_is_left_when_the_program_is_killed(self) -> None:
        opened().close()  # or skip
        code = """
import sys, time
from spear_lightning.sandbox import BubblewrapSandbox
from tests.sandbox.test_hostile import inside
sandbox = BubblewrapSandbox(preload=(), self_test=False)
sandbox.open()
sandbox.session().run("import os, time\\nif os.fork() == 0: time.sleep(100)")
print(*inside(sandbox), flush=True)
time.sleep(100)
"""
        program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert program.stdout is not None
        pids = program.stdout.readline().split()
        assert len(alive(pids)) == 4
        program.kill()
        program.communicate()
        assert eventually(lambda: not alive(pids))

    def test_two_programs_with_many_calls_leak_nothing(self) -> None:
        opened().close()  # or skip
        code = """
import json, os
from spear_lightning.sandbox import BubblewrapSandbox, SandboxLimits
from tests.sandbox.test_hostile import inside
sandbox = BubblewrapSandbox(SandboxLimits(wall_seconds=10, processes=4), preload=("numpy",), self_test=False)
sandbox.open()
def state():
    zygote = inside(sandbox)[-1]
    mounts = open(f"/proc/{zygote}/mounts").read().count("\\n")
    return [len(inside(sandbox)), len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{zygote}/fd")), mounts]
before = state()
wrong = [n for n in range(100) if sandbox.run(f"print({n})").stdout != f"{n}\\n"]
wrong += [n for n in range(10) if "BlockingIOError" not in sandbox.run("import os\\nwhile True: os.fork()").error]
for n in range(10):
    with sandbox.session() as session:
        session.run("x = 1")
print(json.dumps([before, state(), wrong]))
sandbox.close()
print(len(os.listdir("/proc/self/fd")))
"""
        programs = [
            subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for program in programs:
            said, _ = program.communicate(timeout=50)
            (before, after, wrong), descriptors = (json.loads(line) for line in said.splitlines())
            assert program.returncode == 0
            assert wrong == []
            assert after == before
            assert descriptors == before[1] - 3
        assert not left_groups()

    def test_it_works_after_the_thread_that_opened_it_ended(self) -> None:
        opened().close()  # or skip
        sandbox = BubblewrapSandbox(LIMITS, preload=(), self_test=False)
        thread = threading.Thread(target=sandbox.open)
        thread.start()
        thread.join()
        assert eventually(lambda: not inside(sandbox))  # the kernel ends it with its thread
        assert sandbox.run("print(1)").stdout == "1\n"
        sandbox.close()

    def test_it_is_pickled_without_what_is_alive(self, sandbox: BubblewrapSandbox) -> None:
        sandbox.run("print(1)")
        with pickle.loads(pickle.dumps(sandbox)) as copy:
            assert copy.limits == sandbox.limits
            assert copy.run("print(1)").stdout == "1\n"
            assert set(inside(copy)).isdisjoint(inside(sandbox))

    def test_a_fork_of_the_owner_starts_its_own(self, sandbox: BubblewrapSandbox) -> None:
        sandbox.run("print(1)")
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writing, sandbox.run("print(3)").stdout.encode())
            sandbox.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 10) == b"3\n"
        assert sandbox.run("print(4)").stdout == "4\n"
        os.close(reading)
        os.close(writing)

    def test_wall_of_a_single_call(self, sandbox: BubblewrapSandbox) -> None:
        assert sandbox.call("while True: pass", 0.1).error == "killed after 0.1 s"


def left_groups() -> list[Path]:
    """Control groups of programs that are gone, or of this one."""
    found = Path("/sys/fs/cgroup").glob(f"**/spear-sandbox-{os.getpid()}-*")
    return [path for path in found if path.is_dir() and not (path / "cgroup.procs").read_text()]


class TestStarting:
    def test_no_bubblewrap(self) -> None:
        with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
            BubblewrapSandbox(executable="/nowhere/bwrap").open()

    def test_bubblewrap_that_fails(self, tmp_path: Path) -> None:
        broken = tmp_path / "bwrap"
        broken.write_text("#!/bin/sh\necho 'no permission to make namespaces' >&2\nexit 1\n")
        broken.chmod(0o755)
        with pytest.raises(SandboxError, match="no permission to make namespaces"):
            BubblewrapSandbox(executable=str(broken)).open()

    def test_a_package_that_is_missing(self) -> None:
        with pytest.raises(SandboxError, match="pip install not_a_package"):
            BubblewrapSandbox(packages=("not_a_package",), executable="/bin/true").open()

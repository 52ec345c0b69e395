"""The process that runs a snippet: a fork of the zygote that drops all privileges before it runs the first line.

It is process 1 of a pid namespace of its own: it sees no other process, and when it ends, the kernel ends all that it
started.
"""

from __future__ import annotations

import linecache
import os
import resource
import signal
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from . import kernel
from .wire import read_all, write_all

_NOBODY_GROUP = 65534
_OPEN_FILES = 128
_INODES = 4096
_SIGNALS = 256  # queued signals and timers, which are the kernel's memory
_CODE_NAME = "<code>"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a cell may use.

    Attributes:
        memory: bytes of address space on top of what the zygote uses, per process.
        cpu: CPU-seconds per process.
        session_cpu: the same in a session.
        processes: processes and threads.
        disk: bytes of ``/tmp``.
        output: bytes of output, both streams together.
        privileged: whether the zygote is the host's root, so that a cell can have a user id of its own.
        first_user: that user id is this one or one of the next 255.
        seccomp: the system call filter.
    """

    memory: int
    cpu: int
    session_cpu: int
    processes: int
    disk: int
    output: int
    privileged: bool
    first_user: int
    seccomp: bytes


def lock_in(rules: Rules, user: int, descriptors: Sequence[int]) -> None:
    """Drop everything that a snippet must not have. If any step fails, this raises, and no snippet is run.

    Args:
        rules: the limits.
        user: user id to become, where the zygote is privileged.
        descriptors: open files to keep besides 0, 1 and 2.

    Raises:
        OSError: the kernel refused a step.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the zygote ignores
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    low = 3
    for kept in sorted(descriptors):
        os.closerange(low, kept)
        low = kept + 1
    os.closerange(low, 1 << 16)
    os.setsid()
    kernel.unshare(kernel.NEW_MOUNTS)
    kernel.mount_tmpfs("/tmp", f"size={rules.disk},nr_inodes={_INODES},mode=1777")
    os.chdir("/tmp")
    _set_limits(rules)
    if rules.privileged:
        os.setgroups([])
        os.setresgid(_NOBODY_GROUP, _NOBODY_GROUP, _NOBODY_GROUP)
        os.setresuid(user, user, user)
    kernel.drop_capabilities()
    kernel.install_filter(rules.seccomp)


def _set_limits(rules: Rules) -> None:
    limits = {
        resource.RLIMIT_CPU: rules.cpu,
        resource.RLIMIT_FSIZE: rules.disk,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_NPROC: rules.processes,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: _SIGNALS,
        resource.RLIMIT_AS: rules.memory,
    }
    for name, most in limits.items():
        _, hard = resource.getrlimit(name)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))


def run_once(code: bytes) -> NoReturn:
    """Run a snippet as a script and end this process."""
    status = execute(code, _main_module().__dict__)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as a script does when it ends
    except BaseException as error:
        _report(error)
        status = status or 1
    flushed = _flush()
    os._exit(status or flushed)


def serve(code_from: int, done_to: int) -> NoReturn:
    """Run snippet after snippet over the same variables; a length, then the code, comes through ``code_from``."""
    variables = _main_module().__dict__
    own = os.getpid()
    while header := read_all(code_from, 4):
        code = read_all(code_from, int.from_bytes(header, "little")) or b""
        status = execute(code, variables)
        _flush()
        if os.getpid() != own:  # a fork that the snippet made, and that came to its end
            os._exit(0)
        os.write(done_to, bytes([status != 0]))
    os._exit(0)


def execute(code: bytes, variables: dict[str, object]) -> int:
    """Run ``code`` and return its exit status; a traceback goes to descriptor 2, whatever ``sys.stderr`` is by then."""
    try:
        text = code.decode("utf-8", "surrogatepass")
        linecache.cache[_CODE_NAME] = (len(text), None, text.splitlines(keepends=True), _CODE_NAME)
        exec(compile(text, _CODE_NAME, "exec"), variables)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        os.write(2, f"{error.code}\n".encode("utf-8", "replace"))
        return 1
    except BaseException as error:
        _report(error)
        return 1
    return 0


def _report(error: BaseException) -> None:
    trace = error.__traceback__
    try:
        own = trace.tb_next if trace is not None else None  # without the frame of `execute`
        lines = traceback.format_exception(type(error), error, own)
    except BaseException:  # no memory left for it, or an exception whose __str__ raises
        error.__traceback__ = trace = own = None
        lines = [f"{type(error).__name__}\n"]
    write_all(2, "".join(lines).encode("utf-8", "replace"))


def _main_module() -> types.ModuleType:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    return module


def _flush() -> int:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:  # the snippet may have closed or replaced them
        _report(error)
        return 1
    return 0

"""The few system calls that Python does not offer (3.10 has neither ``unshare`` nor ``setns``), through ctypes."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource

NEW_MOUNTS = 0x00020000
NEW_PIDS = 0x20000000
_NO_SUID_DEV_EXEC = 2 | 4 | 8
_SET_NO_NEW_PRIVILEGES = 38
_SET_SECCOMP, _SECCOMP_FILTER = 22, 2
_CAPABILITY_VERSION = 0x20080522
_PROBE_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def unshare(flags: int) -> None:
    """Leave namespaces for new ones.

    Raises:
        OSError: the kernel refused.
    """
    _check(_libc.unshare(flags), "unshare")


def setns(descriptor: int, flags: int) -> None:
    """Join namespaces of the process that ``descriptor`` (a pidfd) names.

    Raises:
        OSError: the kernel refused.
    """
    _check(_libc.setns(descriptor, flags), "setns")


def mount_tmpfs(where: str, options: str) -> None:
    """Mount an empty file system of limited size, without devices, set-uid programs or programs.

    Raises:
        OSError: the kernel refused.
    """
    mounted = _libc.mount(b"tmpfs", where.encode(), b"tmpfs", _NO_SUID_DEV_EXEC, options.encode())
    _check(mounted, f"mount {where}")


def drop_capabilities() -> None:
    """Give up all capabilities, for good: no program can bring any back.

    Raises:
        OSError: the kernel refused.
    """
    _check(_libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no_new_privs")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def install_filter(program: bytes) -> None:
    """Put a seccomp filter (see :mod:`.seccomp`) over this process and all it will ever start.

    Raises:
        OSError: the kernel refused.
    """
    record = _Program(len(program) // 8, program)
    _check(_libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(record), 0, 0), "seccomp")


def address_space() -> int:
    """Bytes of address space this process uses, within 1 MiB, without a ``/proc`` to read it from."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    low, high = 0, 1 << 40
    try:
        while high - low > _PROBE_BYTES:
            middle = (low + high) // 2
            resource.setrlimit(resource.RLIMIT_AS, (middle, old[1]))
            try:
                mmap.mmap(-1, _PROBE_BYTES).close()
                high = middle
            except (OSError, MemoryError):
                low = middle
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    return high


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")

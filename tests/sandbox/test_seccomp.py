"""The system call filter, interpreted as the kernel does, for both machines it knows."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from spear_lightning.sandbox.inside.seccomp import BLOCKED, build_filter

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENIED, ABSENT = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def decide(program: bytes, number: int, architecture: int, *arguments: int) -> int:
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator = position = 0
    instructions = list(struct.iter_unpack("<HBBI", program))
    for _ in range(len(instructions)):
        code, true, false, operand = instructions[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == 0x06:
            return operand
        else:
            met = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}[code]
            position += true if met else false
    raise AssertionError("the program does not return")


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_blocked_calls(machine: str, column: int) -> None:
    program, architecture = build_filter(machine), ARCHITECTURES[machine]
    for name, numbers in BLOCKED.items():
        number = numbers[column]
        if number is not None:
            assert decide(program, number, architecture) == DENIED, name


@pytest.mark.parametrize(
    ("machine", "usual", "clone", "ioctl"),
    [
        ("x86_64", {"read": 0, "mmap": 9, "execve": 59, "futex": 202, "socketpair": 53}, 56, 16),
        ("aarch64", {"read": 63, "mmap": 222, "execve": 221, "futex": 98, "socketpair": 199}, 220, 29),
    ],
)
def test_usual_calls(machine: str, usual: dict[str, int], clone: int, ioctl: int) -> None:
    program, architecture = build_filter(machine), ARCHITECTURES[machine]
    for name, number in usual.items():
        assert decide(program, number, architecture) == ALLOW, name
    for number in (424, 434, 436, 437, 439, 441, 449, 452):
        assert decide(program, number, architecture) == ALLOW
    for number in (425, 426, 427, 428, 435, 438, 440, 442, 447, 453, 600):
        assert decide(program, number, architecture) == ABSENT
    thread, namespaces = 0x3D0F00, (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
    assert decide(program, clone, architecture, thread) == ALLOW
    assert decide(program, clone, architecture, 17) == ALLOW
    for flag in namespaces:
        assert decide(program, clone, architecture, 17 | flag) == DENIED
    assert decide(program, ioctl, architecture, 1, 0x5401) == ALLOW
    assert decide(program, ioctl, architecture, 1, 0x5412) == DENIED


def test_other_interfaces_to_the_kernel() -> None:
    program = build_filter("x86_64")
    assert decide(program, 0, 0x40000003) == KILL  # 32-bit calls, which have numbers of their own
    assert decide(program, 0x40000000, ARCHITECTURES["x86_64"]) == KILL
    with pytest.raises(OSError, match="no seccomp table for riscv64"):
        build_filter("riscv64")


@pytest.mark.parametrize(("machine", "column"), [("x86_64", 0), ("aarch64", 1)])
def test_numbers_are_those_of_the_kernels_headers(machine: str, column: int) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not installed")
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    for name, numbers in BLOCKED.items():
        if numbers[column] is not None:
            assert int(defined[name]) == numbers[column], name

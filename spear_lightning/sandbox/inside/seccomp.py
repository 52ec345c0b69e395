"""The system calls that a snippet may not make, as a classic BPF program assembled here.

Namespaces, an unprivileged user and dropped capabilities already stop most of these; the filter also takes away the
parts of the kernel where mistakes are found again and again. Calls newer than this file are refused too.
"""

from __future__ import annotations

import errno
import platform
import struct

# Name: (number on x86_64, number on aarch64); numbers from the kernel's own headers.
BLOCKED: dict[str, tuple[int | None, int | None]] = {
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    # File systems and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # Large interfaces of the kernel.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "vhangup": (153, 58),
    "nfsservctl": (180, 42),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    "seccomp": (317, 277),
    # Memory that neither RLIMIT_AS nor the size of /tmp counts, or that outlives the process.
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "remap_file_pages": (216, 234),
    # The network. Pairs of connected sockets (socketpair) stay: asyncio needs one.
    "socket": (41, 198),
}
_CLONE = (56, 220)
_IOCTL = (16, 29)
# From here on numbers are equal everywhere. What is not listed does not exist (io_uring is 425 to 427, clone3 435).
_FIRST_COMMON = 424
_COMMON_ALLOWED = (
    424,  # pidfd_send_signal
    434,  # pidfd_open
    436,  # close_range
    437,  # openat2
    439,  # faccessat2
    441,  # epoll_pwait2
    449,  # futex_waitv
    452,  # fchmodat2
)
_NEW_NAMESPACES = 0x7E020000
_FAKE_INPUT = 0x5412  # TIOCSTI
_X32 = 0x40000000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD = 0x20
_EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_FIRST_ARGUMENT, _SECOND_ARGUMENT = 16, 24  # low halves, little endian
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def build_filter(machine: str | None = None) -> bytes:
    """The filter as ``struct sock_filter`` records.

    Args:
        machine: ``x86_64`` or ``aarch64``; ``None`` takes this machine's.

    Raises:
        OSError: there is no table for this machine.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp table for {machine}")
    column, architecture = _ARCHITECTURES[machine]
    denied = _ERROR | errno.EPERM
    absent = _ERROR | errno.ENOSYS  # the C library then takes the older call, whose flags can be seen here
    program = [
        _op(_LOAD, _ARCHITECTURE),
        _op(_EQUAL, architecture, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
    ]
    if column == 0:
        program += [_op(_AT_LEAST, _X32, 0, 1), _op(_RETURN, _KILL)]
    for number in sorted(filter(None, (numbers[column] for numbers in BLOCKED.values()))):
        program += [_op(_EQUAL, number, 0, 1), _op(_RETURN, denied)]
    for number in _COMMON_ALLOWED:
        program += [_op(_EQUAL, number, 0, 1), _op(_RETURN, _ALLOW)]
    program += [_op(_AT_LEAST, _FIRST_COMMON, 0, 1), _op(_RETURN, absent)]
    program += [
        _op(_EQUAL, _CLONE[column], 0, 3),
        _op(_LOAD, _FIRST_ARGUMENT),
        _op(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _op(_RETURN, denied),
        _op(_LOAD, _NUMBER),
        _op(_EQUAL, _IOCTL[column], 0, 3),
        _op(_LOAD, _SECOND_ARGUMENT),
        _op(_EQUAL, _FAKE_INPUT, 0, 1),
        _op(_RETURN, denied),
        _op(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _op(code: int, operand: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, operand)

"""Snippets that try to get out, to take more than they may, or to spoil the next call.

Each prints ESCAPED if it got what it was after. ``expect`` is what its output or error must show, so that a snippet that
fails for a silly reason does not pass as contained. In the code, CANARY is a file of the host, PORT a
port of the host that listens and HOST_PID the process id of the test.
"""

# ruff: noqa: E501 - snippets are shorter to read on one line

from __future__ import annotations

from dataclasses import dataclass

CALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(*arguments)
    code = errno.errorcode.get(ctypes.get_errno(), 0)
    print(name, "ESCAPED" if result != -1 or code not in ("EPERM", "ENOSYS") else code)
"""
TRY = """
def attempt(action):
    try:
        print("ESCAPED", action())
    except OSError as error:
        print("refused", type(error).__name__)
"""


@dataclass(frozen=True)
class Hostile:
    """A snippet and what its output and error together must match."""

    name: str
    code: str
    expect: str
    prelude: str = ""


FILES = [
    Hostile("read_host_file", "print('ESCAPED', open('CANARY').read())", "FileNotFoundError"),
    Hostile("read_passwd", "print('ESCAPED', open('/etc/passwd').read())", "FileNotFoundError"),
    Hostile("read_shadow", "print('ESCAPED', open('/etc/shadow').read())", "FileNotFoundError"),
    Hostile(
        "list_homes",
        "import os\nattempt(lambda: os.listdir('/root'))\nattempt(lambda: os.listdir('/home'))",
        "refused",
        TRY,
    ),
    Hostile("write_host_file", "open('CANARY', 'w').write('ESCAPED')", "FileNotFoundError"),
    Hostile("make_host_folder", "import os\nos.makedirs('/home/new')\nprint('ESCAPED')", "OSError|PermissionError"),
    Hostile("write_root", "open('/escaped', 'w').write('x')\nprint('ESCAPED')", "OSError|PermissionError"),
    Hostile(
        "write_libraries",
        "import numpy\nopen(numpy.__file__, 'a').write('x')\nprint('ESCAPED')",
        "OSError|PermissionError",
    ),
    Hostile(
        "write_zygote", "open('/opt/zygote/inside/cell.py', 'a').write('x')\nprint('ESCAPED')", "Read-only|Permission"
    ),
    Hostile(
        "symlink_out",
        "import os\nos.symlink('CANARY', '/tmp/l')\nprint('ESCAPED', open('/tmp/l').read())",
        "FileNotFound",
    ),
    Hostile(
        "hardlink_system_file",
        "import os\nattempt(lambda: os.link('/usr/bin/env', '/tmp/e'))\nattempt(lambda: os.link('/etc/ld.so.cache', '/tmp/c'))",
        "refused",
        TRY,
    ),
    Hostile(
        "dot_dot",
        "import os\nfor n in range(1, 30):\n    p = '../' * n + 'CANARY'[1:]\n    if os.path.exists(p): print('ESCAPED')\nprint('looked')",
        "looked",
    ),
    Hostile("chroot", "import os\nattempt(lambda: os.chroot('/tmp'))", "PermissionError", TRY),
    Hostile(
        "device_node", "import os\nattempt(lambda: os.mknod('/tmp/d', 0o60600, os.makedev(254, 0)))", "Permission", TRY
    ),
    Hostile(
        "set_uid_program",
        "import subprocess\nprint(subprocess.run(['/usr/bin/su', '-c', 'id'], capture_output=True))",
        "returncode=[1-9]|FileNotFoundError|PermissionError",
    ),
    Hostile(
        "run_from_tmp",
        "import os, shutil, subprocess\nshutil.copy('/usr/bin/env', '/tmp/env')\nos.chmod('/tmp/env', 0o755)\nsubprocess.run(['/tmp/env'])\nprint('ESCAPED')",
        "PermissionError",
    ),
]

NETWORK = [
    Hostile(
        "connect",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint('ESCAPED')",
        "PermissionError",
    ),
    Hostile(
        "udp", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nprint('ESCAPED')", "PermissionError"
    ),
    Hostile(
        "raw_socket",
        "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)\nprint('ESCAPED')",
        "PermissionError",
    ),
    Hostile(
        "netlink",
        "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\nprint('ESCAPED')",
        "PermissionError",
    ),
    Hostile(
        "unix_socket", "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0x')\nprint('ESCAPED')", "PermissionError"
    ),
    Hostile("vsock", "import socket\nsocket.socket(40, socket.SOCK_STREAM)\nprint('ESCAPED')", "PermissionError"),
    Hostile(
        "resolve_and_get",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT', timeout=1)\nprint('ESCAPED')",
        "URLError",
    ),
]

PROCESSES = [
    Hostile(
        "see_host_process",
        "import os\nattempt(lambda: os.kill(HOST_PID, 0))\nattempt(lambda: os.listdir('/proc'))",
        "refused",
        TRY,
    ),
    Hostile(
        "kill_everybody", "import os, signal\nattempt(lambda: os.kill(-1, signal.SIGKILL))", "ProcessLookupError", TRY
    ),
    Hostile("kill_parent", "import os, signal\nprint(os.getppid())\nos.kill(os.getppid(), signal.SIGKILL)", "0|killed"),
    Hostile(
        "kill_low_pids",
        "import os, signal\nfor p in range(2, 5000):\n    try:\n        os.kill(p, signal.SIGKILL); print('ESCAPED', p)\n    except ProcessLookupError: pass\nprint('none')",
        "none",
    ),
    Hostile(
        "thread_bomb",
        "import threading, time\nfor n in range(50):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nprint('ESCAPED')",
        "can't start new thread",
    ),
    Hostile(
        "fork_bomb_counted",
        "import os, time\nfor n in range(50):\n    if os.fork() == 0:\n        time.sleep(60)\nprint('ESCAPED')",
        "BlockingIOError",
    ),
    Hostile("fork_bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "killed after"),
    Hostile(
        "spawn_bomb",
        "import subprocess\np = [subprocess.Popen(['/usr/bin/sleep', '60']) for n in range(50)]\nprint('ESCAPED')",
        "BlockingIOError",
    ),
    Hostile(
        "double_fork_daemon",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\nos.wait()\nprint('left')",
        "left",
    ),
    Hostile(
        "ignore_all_signals",
        "import signal\nfor n in signal.valid_signals():\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "killed after",
    ),
    Hostile(
        "reset_alarms",
        "import signal\nsignal.alarm(0)\nsignal.setitimer(signal.ITIMER_REAL, 0)\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True: pass",
        "killed after",
    ),
    Hostile(
        "stop_itself",
        "import os, signal, time\nif os.fork() == 0:\n    time.sleep(60)\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)",
        "killed after",
    ),
    Hostile(
        "stop_children",
        "import os, signal\np = os.fork()\nif p == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\nos.waitpid(p, 0)",
        "killed after",
    ),
    Hostile(
        "raise_limits",
        "import resource\nfor n in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n    try:\n        resource.setrlimit(n, (-1, -1)); print('ESCAPED')\n    except ValueError as error: print(error)",
        "not allowed to raise",
    ),
    Hostile(
        "become_root",
        "import os\nattempt(lambda: os.setuid(0))\nattempt(lambda: os.setresuid(0, 0, 0))\nattempt(lambda: os.setgid(0))",
        "refused",
        TRY,
    ),
]

KERNEL = [
    Hostile("ptrace", "call('traceme', 101, 0, 0, 0, 0)\ncall('attach', 101, 16, 1, 0, 0)", "EPERM", CALL),
    Hostile(
        "read_other_memory", "call('vm_readv', 310, 1, 0, 0, 0, 0, 0)\ncall('kcmp', 312, 1, 1, 0, 0, 0)", "EPERM", CALL
    ),
    Hostile(
        "mount",
        "call('mount', 165, b'tmpfs', b'/tmp', b'tmpfs', 0, 0)\ncall('umount', 166, b'/tmp', 2)\ncall('pivot', 155, b'/tmp', b'/tmp')",
        "EPERM",
        CALL,
    ),
    Hostile(
        "new_mount_calls",
        "call('fsopen', 430, b'tmpfs', 0)\ncall('open_tree', 428, -100, b'/', 1)\ncall('move_mount', 429, 0, 0, 0, 0, 0)",
        "ENOSYS",
        CALL,
    ),
    Hostile(
        "unshare",
        "for flag in (0x10000000, 0x20000000, 0x20000, 0x40000000): call('unshare', 272, flag)",
        "EPERM",
        CALL,
    ),
    Hostile(
        "clone_user_namespace",
        "call('clone', 56, 0x10000000 | 17, 0, 0, 0, 0)\ncall('clone3', 435, 0, 0)",
        "EPERM",
        CALL,
    ),
    Hostile("setns", "call('setns', 308, os.pidfd_open(os.getpid()), 0x20000000)", "EPERM", CALL),
    Hostile("bpf", "call('bpf', 321, 0, ctypes.create_string_buffer(64), 64)", "EPERM", CALL),
    Hostile("perf", "call('perf', 298, ctypes.create_string_buffer(128), 0, -1, -1, 0)", "EPERM", CALL),
    Hostile("keyring", "call('join', 250, 1, 0, 0, 0, 0)\ncall('add', 248, b'user', b'k', b'v', 1, -3)", "EPERM", CALL),
    Hostile("io_uring", "call('io_uring', 425, 4, ctypes.create_string_buffer(128))", "ENOSYS", CALL),
    Hostile("userfaultfd", "call('userfaultfd', 323, 1)", "EPERM", CALL),
    Hostile(
        "modules_and_boot",
        "call('module', 175, 0, 0, b'')\ncall('kexec', 246, 0, 0, 0, 0)\ncall('reboot', 169, 0xfee1dead, 672274793, 0x1234567, 0)\ncall('swap', 168, b'/x')",
        "EPERM",
        CALL,
    ),
    Hostile(
        "clock_and_name",
        "call('clock', 227, 0, ctypes.create_string_buffer(16))\ncall('name', 170, b'x', 1)\ncall('personality', 135, 0x40000)",
        "EPERM",
        CALL,
    ),
    Hostile(
        "shared_memory",
        "call('shmget', 29, 1234, 4096, 0o1777)\ncall('mq_open', 240, b'q', 0o102, 0o666, 0)\ncall('memfd', 319, b'x', 0)",
        "EPERM",
        CALL,
    ),
    Hostile(
        "handles",
        "call('by_handle', 304, -100, ctypes.create_string_buffer(64), 0)\ncall('fanotify', 300, 0, 0)",
        "EPERM",
        CALL,
    ),
    Hostile("new_filter", "call('seccomp', 317, 1, 8, 0)", "EPERM", CALL),
    Hostile("unknown_calls", "for n in (460, 500, 548): call('new', n, 0, 0, 0)", "ENOSYS", CALL),
    Hostile("other_abi", "call('x32', 0x40000000 + 39)", "killed by signal", CALL),
    Hostile(
        "no_capabilities",
        "head = (ctypes.c_uint32 * 2)(0x20080522, 0); data = (ctypes.c_uint32 * 6)()\nlibc.capget(head, data)\nprint('ESCAPED' if any(data) else 'none', libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0))",
        "none 1 2",
        CALL,
    ),
]

RESOURCES = [
    Hostile("memory", "x = bytearray(2**31)\nprint('ESCAPED')", "MemoryError"),
    Hostile("memory_slowly", "x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError|killed"),
    Hostile("memory_shared_map", "import mmap\nx = mmap.mmap(-1, 2**31)\nprint('ESCAPED')", "OSError|MemoryError"),
    Hostile(
        "memory_of_many",
        "import os, time\nfor n in range(5):\n    if os.fork() == 0:\n        x = b'x' * 100 * 2**20\n        time.sleep(60)\ntime.sleep(0.3)\nprint('parent')",
        "parent|killed",
    ),
    Hostile(
        "lock_memory",
        "call('mlockall', 151, 3)",
        "ENOMEM|EPERM",
        CALL.replace('"EPERM", "ENOSYS"', '"EPERM", "ENOSYS", "ENOMEM"'),
    ),
    Hostile(
        "one_large_file",
        "with open('/tmp/f', 'wb') as f:\n    while True: f.write(bytes(2**20))",
        "File too large|No space",
    ),
    Hostile(
        "many_files",
        "n = 0\nwhile True:\n    n += 1\n    with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(2**20))",
        "No space left",
    ),
    Hostile(  # one call of the system a name: the limit is reached before the time is up, on a slow machine too
        "many_names",
        "import os\nfor n in range(10**6): os.symlink('x', f'/tmp/{n}')\nprint('ESCAPED')",
        "No space left",
    ),
    Hostile(
        "many_descriptors", "f = [open('/dev/null') for n in range(5000)]\nprint('ESCAPED')", "Too many open files"
    ),
    Hostile("output_flood", "while True: print('x' * 10000)", "bytes of output"),
    Hostile("error_flood", "import os\nwhile True: os.write(2, b'x' * 10000)", "bytes of output"),
    Hostile(
        "large_pipe", "import fcntl, os\nfcntl.fcntl(1, 1031, 2**20)\nos.write(1, b'x' * 2**20)", "bytes of output"
    ),
    Hostile("endless_loop", "while True: pass", "killed after"),
    Hostile("sleep", "import time\ntime.sleep(3600)", "killed after"),
    Hostile("endless_generator", "import itertools\nsum(1 for _ in itertools.count())", "killed after"),
    Hostile("huge_integer", "print(len(str(7 ** 7 ** 9)))", "killed after|ValueError|MemoryError"),
    Hostile("regular_expression", "import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", "killed after"),
    Hostile("deep_recursion", "def f(n): return f(n + 1)\nf(0)", "RecursionError"),
    Hostile(
        "deeper_recursion",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return sorted([x], key=f)\nf(0)",
        "killed|MemoryError",
    ),
    Hostile("crash", "import ctypes\nctypes.string_at(0)", "killed by signal 11"),
    Hostile("nested_parentheses", "eval('(' * 100000 + ')' * 100000)", "MemoryError|SyntaxError|killed|RecursionError"),
]

POISON = [
    Hostile(
        "modules",
        "import sys, builtins, math, json, numpy\nmath.factorial = json.dumps = None\nbuiltins.print = None\nsys.modules['math'] = None\nnumpy.array = None\nsys.poisoned = 1",
        "^$",
    ),
    Hostile(
        "standard_streams",
        "import sys, os\nsys.stdout = sys.stderr = sys.__stdout__ = None\nos.close(1); os.close(2)",
        "^$|exit code",
    ),
    Hostile(
        "descriptors",
        "import os\nfor n in range(3, 1024):\n    for action in (lambda: os.write(n, b'\\xff' * 64), lambda: os.read(n, 1)):\n        try:\n            action(); print('ESCAPED', n)\n        except OSError: pass\nprint('none open')",
        "none open",
    ),
    Hostile(
        "write_to_input", "import os\ntry: os.write(0, b'\\xff' * 4096)\nexcept OSError: pass\nprint('done')", "done"
    ),
    Hostile(
        "files_left", "import os\nopen('/tmp/poison', 'w').write('x')\nopen('/dev/shm/poison', 'w').write('x')", "^$"
    ),
    Hostile(
        "frames",
        "import sys\nf = sys._getframe()\nwhile f:\n    for name, value in list(f.f_locals.items()):\n        if type(value).__name__ == 'Zygote':\n            value.rules = None; value.output = 0\n    f = f.f_back\nprint('walked')",
        "walked",
    ),
    Hostile(
        "at_exit",
        "import atexit, threading, os\natexit.register(lambda: os.write(1, b'x' * 100))\nthreading.Thread(target=lambda: None).start()\nprint('registered')",
        "registered",
    ),
    Hostile(
        "thread_that_stays",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint('main ends')",
        "killed after",
    ),
    Hostile("exit_code", "import os\nos._exit(77)", "exit code 77"),
    Hostile("exit_quietly", "raise SystemExit", "^$"),
    Hostile("exit_message", "raise SystemExit('no')", "no"),
    Hostile("keyboard_interrupt", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    Hostile("exception_that_raises", "class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
    Hostile("no_utf8", "import os\nos.write(1, b'\\xff\\xfe\\x00\\x80')", "\ufffd"),
    Hostile("null_byte", "print('ESCAPED')\x00", "null bytes"),
    Hostile("lone_surrogate", "print('\ud800')", "UnicodeEncodeError"),
    Hostile("no_code", "", "^$"),
    Hostile("fork_and_return", "import os\nos.fork()\nprint('twice')", "twice"),
    Hostile(
        "exec",
        "import os\nos.execv('/usr/bin/env', ['/usr/bin/env', '-i', 'echo', 'other program'])",
        "other program|No such",
    ),
    Hostile(
        "forged_reply",
        "import os, struct\nos.write(1, struct.pack('<BiII', 1, 0, 4, 0) + b'fake')\nos.write(2, b'fake')",
        "fake",
    ),
]

ALL = [*FILES, *NETWORK, *PROCESSES, *KERNEL, *RESOURCES, *POISON]

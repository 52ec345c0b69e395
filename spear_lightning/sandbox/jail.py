"""The command line that builds the sandbox: which files exist in it, and which namespaces and capabilities it has."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from spear_lightning.sandbox.base import INSTALL_HINT, SandboxError

OWN_PATH = "/opt/zygote"
_PACKAGES = "/opt/packages"
_PYTHON = "/opt/python"
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PATH": "/usr/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONPATH": f"{OWN_PATH}:{_PACKAGES}",
    "PYTHONHASHSEED": "0",  # sets are in the same order in every call
    "LD_LIBRARY_PATH": f"{_PYTHON}/lib",
}
_INSIDE = Path(__file__).with_name("inside")
_MAIN = "import sys; from inside.zygote import main; main(sys.argv[1:])"
_FIRST_USER = 1 << 31  # from here on no convention gives user ids to anybody
_USERS = 256  # of a sandbox
_MANY_USERS = 1 << 15


def privileged() -> bool:
    """Whether this is root over enough user ids to give each sandbox some that nobody else has."""
    return os.geteuid() == 0 and _highest_user() > _MANY_USERS


def first_user() -> int:
    """A user id from which 256 are a sandbox' own: drawn, so that no two sandboxes of a machine have the same."""
    highest = _highest_user()
    lowest = _FIRST_USER if highest > _FIRST_USER + _MANY_USERS else highest // 2
    return lowest + _USERS * secrets.randbelow((highest - lowest) // _USERS)


def _highest_user() -> int:
    try:
        ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return 0
    return next((count for inside, _, count in ranges if inside == 0), 0)


def command(settings: str, packages: Iterable[str], executable: str | None = None) -> list[str]:
    """The ``bwrap`` command of a zygote.

    Args:
        settings: JSON for the zygote.
        packages: names of the packages that exist inside, besides the standard library.
        executable: of bubblewrap; ``None`` looks it up.

    Raises:
        SandboxError: bubblewrap or a package is not installed.
    """
    bwrap = executable or shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError(f"bubblewrap is not installed: {INSTALL_HINT}")
    python, interpreter = _python()
    arguments = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if privileged():
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            arguments += ["--cap-add", capability]
    else:
        arguments.append("--unshare-user")
    for name, value in _ENVIRONMENT.items():
        arguments += ["--setenv", name, value]
    for folder in ("/usr", "/usr/share", "/etc", "/dev", "/opt", OWN_PATH, _PACKAGES, _PYTHON, "/tmp"):
        arguments += ["--dir", folder]  # bubblewrap makes those that are not named for its own user alone
    arguments += [*_system_files(), *python]
    for name in ("null", "zero", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    # Named semaphores and shared memory are files under /dev/shm: they go where the size is limited.
    arguments += ["--symlink", "/tmp", "/dev/shm"]
    arguments += ["--ro-bind", str(_INSIDE), f"{OWN_PATH}/inside"]
    for name in packages:
        arguments += _package(name)
    arguments += ["--chdir", "/", "--remount-ro", "/"]
    return [*arguments, "--", interpreter, "-s", "-B", "-c", _MAIN, settings]


def _system_files() -> list[str]:
    """Libraries and programs, from the distribution only; in ``/etc`` just where libraries are found."""
    arguments = []
    for folder in ("/usr/lib", "/usr/lib64", "/usr/bin", "/usr/share/zoneinfo"):
        arguments += ["--ro-bind-try", folder, folder]
    for folder in ("/lib", "/lib64", "/bin"):
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            arguments += ["--ro-bind", folder, folder]
    return [*arguments, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]


def _python() -> tuple[list[str], str]:
    """Where the interpreter is, without the packages that are installed for it, and its path inside."""
    base = os.path.realpath(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if base == "/usr":
        hidden = "/usr/lib/python3/dist-packages"
        arguments = ["--tmpfs", hidden, "--remount-ro", hidden] if os.path.isdir(hidden) else []
        return arguments, f"/usr/bin/{version}"
    interpreter, packages = f"{_PYTHON}/bin/{version}", f"{_PYTHON}/lib/{version}/site-packages"
    arguments = ["--ro-bind", f"{base}/bin/{version}", interpreter, "--ro-bind", f"{base}/lib", f"{_PYTHON}/lib"]
    return [*arguments, "--tmpfs", packages, "--remount-ro", packages], interpreter


def _package(name: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SandboxError(f"the sandbox is to offer {name}, which is not installed: pip install {name}")
    if not spec.submodule_search_locations:
        return ["--ro-bind", spec.origin, f"{_PACKAGES}/{os.path.basename(spec.origin)}"]
    folder = spec.submodule_search_locations[0]
    arguments = ["--ro-bind", folder, f"{_PACKAGES}/{name}"]
    libraries = f"{folder}.libs"  # where wheels keep the shared libraries that they bring
    return [*arguments, "--ro-bind", libraries, f"{_PACKAGES}/{name}.libs"] if os.path.isdir(libraries) else arguments

"""A control group for each sandbox, where this process may make one: the kernel then counts everything inside together.

Version 1 (a tree for each controller) and version 2 (one tree) both; where neither is writable, the limits of single
processes are all there is.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_PREFIX = "spear-sandbox-"
_REMOVE_SECONDS = 2.0
_LIMIT_FILES = {"pids": ("pids.max", "pids.max"), "memory": ("memory.limit_in_bytes", "memory.max")}


class ControlGroup:
    """Limits on the number of processes and the memory of everything that is started inside it.

    Args:
        name: of the group, unique on this machine; begins with the id of this process.

    Attributes:
        files: where each limit is written, by controller: ``pids``, ``memory``, both or neither.
    """

    def __init__(self, name: str) -> None:
        self.files: dict[str, Path] = {}
        for controller, (folder, version) in _places().items():
            with contextlib.suppress(OSError):
                _sweep(folder)
                own = folder / f"{_PREFIX}{name}"
                own.mkdir(exist_ok=True)
                file = _LIMIT_FILES[controller][version - 1]
                if os.access(own / file, os.W_OK) and os.access(own / "cgroup.procs", os.W_OK):
                    self.files[controller] = own / file
                else:
                    own.rmdir()

    def limit(self, processes: int, memory: int) -> None:
        """Set the limits, for what runs already too.

        Args:
            processes: processes and threads.
            memory: bytes, files in memory included.
        """
        for controller, value in (("pids", processes), ("memory", memory)):
            if controller in self.files:
                with contextlib.suppress(OSError):  # memory cannot be set below what is in use: the old limit holds
                    self.files[controller].write_text(str(value))

    def launcher(self, command: list[str]) -> list[str]:
        """A command that enters the group and becomes ``command``: before anything of it runs, so nothing escapes."""
        files = sorted({str(file.with_name("cgroup.procs")) for file in self.files.values()})
        if not files:
            return command
        script = f'for i in {" ".join(["_"] * len(files))}; do echo 0 > "$1" || exit 70; shift; done; exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *files, *command]

    def remove(self) -> None:
        """Remove the group once its last process is gone, which takes a moment after a kill."""
        end = time.monotonic() + _REMOVE_SECONDS
        for folder in {file.parent for file in self.files.values()}:
            while folder.exists() and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.01)
        self.files.clear()


def _sweep(folder: Path) -> None:
    """Remove what runs that were killed left behind: empty groups named after processes that are gone."""
    for left in folder.glob(f"{_PREFIX}*"):
        number = left.name.removeprefix(_PREFIX).split("-")[0]
        if number.isdigit() and not Path("/proc", number).exists():
            with contextlib.suppress(OSError):
                left.rmdir()


def _places() -> dict[str, tuple[Path, int]]:
    """By controller: the folder of this process' own group, and the version of the interface."""
    own: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own.update((controller, path) for controller in controllers.split(","))
    places: dict[str, tuple[Path, int]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            root, mounted = before.split()[3:5]
            kind, _, options = [*after.split(), "", "", ""][:3]
            for controller in _LIMIT_FILES:
                if kind == "cgroup" and controller in options.split(",") and controller in own:
                    places[controller] = (_below(mounted, root, own[controller]), 1)
                elif kind == "cgroup2" and "" in own:
                    places.setdefault(controller, (_below(mounted, root, own[""]), 2))
    return places


def _below(mounted: str, root: str, path: str) -> Path:
    relative = os.path.relpath(path, root) if path.startswith(root) else "."
    return Path(mounted, relative)

"""Files that are complete or absent."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, never meets half of it.

    The content goes to a temporary file beside ``path``, reaches the disk, and then takes its name.

    Args:
        path: of the file; folders on the way are made.
        content: bytes, or text, which is encoded in UTF-8 (what UTF-8 cannot say, lone surrogates, is written as a
            backslash escape).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def user_cache() -> Path:
    """Where the package keeps what it makes: ``$XDG_CACHE_HOME/spear-lightning``, else under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spear-lightning"


def make_once(root: Path, name: str, marker: str, make: Callable[[Path], None]) -> Path:
    """Make the folder ``root/name`` unless it exists; one process at a time, the others wait for it.

    Args:
        root: parent folder, made if need be.
        name: of the folder; it should name everything that decides the content.
        marker: file that ``make`` writes last.
        make: fills the folder it is given.

    Returns:
        The complete folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = root / name
    if (folder / marker).exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: work is doubled, the rename below decides
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / marker).exists():  # another process was first
            return folder
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}.partial-", ignore_cleanup_errors=True) as partial:
            make(Path(partial))
            os.chmod(partial, 0o755)
            try:
                os.rename(partial, folder)  # complete or absent
            except OSError:
                if not (folder / marker).exists():
                    raise
    return folder

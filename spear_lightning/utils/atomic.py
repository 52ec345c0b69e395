"""Files that are complete or absent."""

from __future__ import annotations

import os
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

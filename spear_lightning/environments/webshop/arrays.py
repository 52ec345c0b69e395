"""Arrays and texts on disk that are mapped into memory, so that all processes of a machine share one copy."""

from __future__ import annotations

import mmap
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def save_array(folder: Path, name: str, values: npt.NDArray[Any]) -> None:
    """Write an array as ``<folder>/<name>.npy``."""
    np.save(folder / f"{name}.npy", values)


def read_array(folder: Path, name: str) -> npt.NDArray[Any]:
    """Map the array ``<folder>/<name>.npy`` into memory; it cannot be written to."""
    path = folder / f"{name}.npy"
    mapped = np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)
    return np.asarray(mapped)  # slicing a memmap costs microseconds, slicing a view of it does not


class Blobs:
    """Byte strings one after the other in a file, by number.

    Args:
        folder: where it is.
        name: of the pair of files ``<name>.bin`` and ``<name>_ends.npy`` that :class:`BlobWriter` wrote.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._ends = read_array(folder, f"{name}_ends")
        with (folder / f"{name}.bin").open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> bytes:
        start = int(self._ends[number - 1]) if number else 0
        return self._bytes[start : int(self._ends[number])]


class BlobWriter:
    """Writes byte strings for :class:`Blobs`.

    Args:
        folder: where to.
        name: of the pair of files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._file = (folder / f"{name}.bin").open("wb")
        self._ends = array("q")

    def add(self, content: bytes) -> None:
        """Append a string."""
        self._file.write(content)
        self._ends.append(self._file.tell())

    def finish(self) -> None:
        """Complete the files."""
        self._file.write(b"\0")  # an empty file cannot be mapped
        self._file.close()
        save_array(self._folder, f"{self._name}_ends", np.asarray(self._ends, np.int64))

"""Checkpoints as directories that are complete or absent: what is in one, whether it is whole, and which is the newest.

A checkpoint is a folder with what the training strategy wrote (``state``: a file, or a directory of shards), what each
rank alone holds (``ranks``: a file a rank) and a manifest of all these files. It is written under a name that is never
looked at and published by a rename, so a process that is killed at any moment leaves the older ones as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from spear_lightning.utils.atomic import write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state"
RANKS = "ranks"
LATEST = "latest"
_FORMAT = 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is and what it consists of.

    Attributes:
        iteration: iterations done.
        written: seconds since 1970; tells older from newer, whatever their iteration.
        world_size: number of ranks that wrote it.
        strategy: class name of the training strategy.
        stage: ZeRO stage; ``None`` where nothing is partitioned, and any number of ranks can load it.
        versions: of the packages that wrote it.
        score: of the validation that belongs to it, if there was one.
        run: names the run, however often it was resumed.
        files: by path relative to the checkpoint.
        policy: fingerprint of the policy, where the module has one.
        universal: whether any number of ranks can load it although it is partitioned (``spear reshard``).
    """

    iteration: int
    written: float
    world_size: int
    strategy: str
    stage: int | None
    versions: Mapping[str, str]
    score: float | None
    run: str
    files: Mapping[str, StoredFile]
    policy: Mapping[str, str | int] | None = None
    universal: bool = False

    @property
    def ranks(self) -> int | None:
        """Number of ranks that can go on from it; ``None`` for any."""
        return self.world_size if self.stage and not self.universal else None

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint that has everything else."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)
        write_atomically(folder / MANIFEST, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            ValueError: there is none, or it cannot be read; the message names the file.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError("it was written by another version of spear-lightning")
            files = {name: StoredFile(**entry) for name, entry in values.pop("files").items()}
            return cls(**values, files=files)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, StoredFile]:
    """Size and hash of some files, read back from the disk once they are safely on it.

    Args:
        folder: that ``names`` are relative to.
        names: of the files.
    """
    found = {}
    for name in names:
        digest, size = hashlib.sha256(), 0
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            while block := file.read(_BLOCK):
                digest.update(block)
                size += len(block)
        found[name] = StoredFile(size, digest.hexdigest())
    return found


def file_names(folder: Path) -> list[str]:
    """All files below a folder, by path relative to it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def publish(partial: Path, directory: Path, iteration: int) -> Path:
    """Give a finished checkpoint its name, and point ``latest`` at it.

    Args:
        partial: the finished folder; on the same file system.
        directory: of the run's checkpoints.
        iteration: that it stands for.

    Returns:
        Where it is: ``iteration-00012``, or with a number behind it where there is one already (an iteration that was
        trained again). Nothing is removed before something newer is in its place.
    """
    name, number = f"iteration-{iteration:05d}", 1
    final = directory / name
    while final.exists():
        number += 1
        final = directory / f"{name}.{number}"
    os.rename(partial, final)
    _sync(directory)
    write_atomically(directory / LATEST, final.name + "\n")
    return final


def discard(folder: Path) -> None:
    """Remove a checkpoint; at no moment is half of it there under its name."""
    trash = folder.with_name(f".removed-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def problem(folder: Path, *, hashes: bool = False) -> str | None:
    """Why a folder is not a whole checkpoint; ``None`` if it is one.

    Args:
        folder: to look at.
        hashes: compare contents too, not only sizes. Reads everything.
    """
    try:
        manifest = Manifest.load(folder)
    except ValueError as error:
        return str(error)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected.size:
            return f"{path} has {path.stat().st_size} bytes instead of {expected.size}"
        if hashes and describe_files(folder, [name])[name] != expected:
            return f"{path} is not what was written (its hash differs)"
    return None


def load_complete(folder: Path, *, hashes: bool = False) -> Manifest:
    """The manifest of a folder that is a whole checkpoint.

    Args:
        folder: to look at.
        hashes: compare contents too, not only sizes. Reads everything.

    Raises:
        ValueError: it is not one; the message says why.
    """
    wrong = problem(folder, hashes=hashes)
    if wrong is not None:
        raise ValueError(f"{folder} is not a complete checkpoint: {wrong}")
    return Manifest.load(folder)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a directory, the newest first; what is not whole is named in the log.

    Args:
        directory: of a run's checkpoints; it need not exist.
    """
    found = []
    for folder in sorted(directory.glob("iteration-*")) if directory.is_dir() else []:
        wrong = problem(folder)
        if wrong is None:
            found.append((Manifest.load(folder).written, folder))
        else:
            logger.warning("%s is not a complete checkpoint and is passed over: %s", folder, wrong)
    return [folder for _, folder in sorted(found, reverse=True)]


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint published last, or the newest whole one if that is damaged; ``None`` if there is none."""
    whole = complete_checkpoints(directory)
    named = None
    with suppress(OSError, UnicodeDecodeError):
        named = directory / (directory / LATEST).read_text(encoding="utf-8").strip()
    return named if named in whole else next(iter(whole), None)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

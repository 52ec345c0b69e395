"""PDDL games translated to the planner's format (SAS+) once, in memory and on disk.

Fast Downward's translator is Python and takes a tenth of a second a game; TextWorld runs it four times to load and
start one. Its result depends on the domain and problem texts only, so it is kept.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from spear_lightning.utils.atomic import write_atomically

_FORMAT = "1"  # raise when what is stored changes
_UNSOLVABLE = "Atom dummy(val1)"  # of the stand-in task that the translator writes when the goal is out of reach


class UnsolvableGameError(ValueError):
    """The game cannot be won."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What TextWorld takes from the translator.

    Attributes:
        sas: the planning task in SAS+ text, without any pruning.
        actions: for each action schema, its parameters as ``(name, type)``.
        types: each type with the names of its supertypes.
        objects: object name to type name.
        facts: initial facts as ``(predicate, arguments)``.
        fluents: predicates that some action changes; all others hold for the whole game.
    """

    sas: str
    actions: dict[str, list[tuple[str, str]]]
    types: list[tuple[str, list[str]]]
    objects: dict[str, str]
    facts: list[tuple[str, list[str]]]
    fluents: list[str]


@contextlib.contextmanager
def _translator() -> Iterator[None]:
    """Undo what the translator does to the process, and spare it a quarter of its time."""
    arguments = sys.argv  # it reads its options from there and overwrites them
    collecting = gc.isenabled()
    gc.disable()  # it allocates many small objects and few cycles
    try:
        yield
    finally:
        sys.argv = arguments
        if collecting:
            gc.enable()


def translate(domain: str, problem: str) -> Translation:
    """Run Fast Downward's translator. Not thread-safe: it swaps ``sys.argv`` and ``sys.stdout`` while it runs.

    Args:
        domain: PDDL text of the domain.
        problem: PDDL text of the problem.

    Returns:
        The translation, with the same options as TextWorld's own.

    Raises:
        UnsolvableGameError: the goal is out of reach whatever is done.
    """
    import fast_downward

    with _translator():
        task, sas = fast_downward.pddl2sas(domain, problem)
    if _UNSOLVABLE in sas:
        raise UnsolvableGameError("its goal cannot be reached")
    # As in textworld.envs.pddl.logic.PddlState: equality is no fact, and the only function counts costs.
    # Sorted, because the translator's order changes with Python's hash seed; the engine keeps sets of them.
    facts = sorted(
        (atom.predicate, list(atom.args))
        for atom in task.init
        if isinstance(atom, fast_downward.translate.pddl.conditions.Atom) and atom.predicate != "="
    )
    return Translation(
        sas=sas,
        actions={
            action.name: [(parameter.name.strip("?"), parameter.type_name) for parameter in action.parameters]
            for action in task.actions
        },
        types=[(type_.name, list(type_.supertype_names)) for type_ in task.types],
        objects={object_.name: object_.type_name for object_ in task.objects},
        facts=facts,
        fluents=sorted({effect.literal.predicate for action in task.actions for effect in action.effects}),
    )


def translate_for_planning(domain: str, problem: str) -> str:
    """SAS+ text pruned for search, which the planner needs and play does not. Not thread-safe either."""
    import fast_downward

    with _translator():
        _, sas = fast_downward.pddl2sas(domain, problem, optimize=True)
    return str(sas)


class TranslationStore:
    """Translations on disk, named by a digest of what they depend on.

    Args:
        folder: where they are kept (about 5 KB a game); made on first use. ``None`` keeps nothing on disk.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._engine = version("textworld")

    def get(self, domain: str, problem: str) -> Translation:
        """The translation of a game: read if it is on disk and whole, else made and, if the disk permits, kept."""
        if self._folder is None:
            return translate(domain, problem)
        path = self._path(self._folder, domain, problem)
        stored = _read(path)
        if stored is None:
            stored = translate(domain, problem)
            # A full or read-only disk costs time, never a run.
            with contextlib.suppress(OSError):
                content = json.dumps(asdict(stored), separators=(",", ":")).encode()
                write_atomically(path, gzip.compress(content, compresslevel=6, mtime=0))
        return stored

    def _path(self, folder: Path, domain: str, problem: str) -> Path:
        digest = hashlib.blake2b(digest_size=16)
        for part in (_FORMAT, self._engine, domain, problem):
            digest.update(part.encode())
            digest.update(b"\0")
        name = digest.hexdigest()
        return folder / name[:2] / f"{name}.json.gz"


def _read(path: Path) -> Translation | None:
    try:
        fields = json.loads(gzip.decompress(path.read_bytes()))
        fields["actions"] = {name: list(map(tuple, pairs)) for name, pairs in fields["actions"].items()}
        return Translation(**fields)
    except (OSError, EOFError, zlib.error, LookupError, ValueError, TypeError, AttributeError):
        return None  # absent, damaged or not ours: it is made anew

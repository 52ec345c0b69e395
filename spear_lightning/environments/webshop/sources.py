"""Where products and instructions come from: the official files, or a generator that writes the same formats."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ijson

from spear_lightning.environments.webshop.arrays import Blobs, BlobWriter
from spear_lightning.environments.webshop.goals import Instruction
from spear_lightning.environments.webshop.records import Product, RecordError, read_product

CATALOGUE_FILES = ("items_shuffle.json", "items_shuffle_1000.json")
ATTRIBUTE_FILES = ("items_ins_v2.json", "items_ins_v2_1000.json")
HUMAN_FILE = "items_human_ins.json"
REVIEW_FILE = "reviews.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A product with what was written about it.

    Attributes:
        product: the product.
        human: instructions written by people.
        synthetic: the instruction made by rule, if there is one.
    """

    product: Product
    human: tuple[Instruction, ...] = ()
    synthetic: Instruction | None = None


class Source(ABC):
    """A catalogue that can be read from beginning to end."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Names everything that decides the content; a catalogue built from it is found by this name."""

    @abstractmethod
    def entries(self, scratch: Path) -> Iterator[Entry]:
        """The products in order, each asin once.

        Args:
            scratch: folder for temporary files, removed by the caller.

        Raises:
            ValueError: a file is missing or broken; the message names it and the record.
        """

    @abstractmethod
    def human_products(self) -> int:
        """How many products people wrote instructions about, in the catalogue or not; known after :meth:`entries`."""


def digest(settings: Mapping[str, Any]) -> str:
    """A short name for settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


class OfficialFiles(Source):
    """WebShop's own data files.

    ``items_shuffle.json`` (or ``items_shuffle_1000.json``) and ``items_ins_v2.json`` (or ``…_1000.json``) are needed;
    ``items_human_ins.json`` for human goals; ``reviews.json`` may be absent.

    Args:
        folder: with the files.
        products: number of records to take, from the first; ``None`` takes all.
    """

    def __init__(self, folder: Path, products: int | None = None) -> None:
        self.folder = folder
        self.products = products
        self._human_products = 0

    @property
    def key(self) -> str:
        """Names, sizes and times of the files, and the number of products."""
        files = [path.stat() for path in self._files()]
        names = [path.name for path in self._files()]
        stamps = [[name, file.st_size, file.st_mtime_ns] for name, file in zip(names, files, strict=True)]
        return digest({"files": stamps, "products": self.products})

    def human_products(self) -> int:
        """How many products people wrote instructions about."""
        return self._human_products

    def entries(self, scratch: Path) -> Iterator[Entry]:
        """The products of the catalogue file."""
        catalogue, attribute_file, *_ = self._files()
        attributes = _Table(scratch, "attributes", read_object(attribute_file))
        people, reviewers = self.folder / HUMAN_FILE, self.folder / REVIEW_FILE
        human = _Table(scratch, "human", read_object(people) if people.is_file() else ())
        found = read_array(reviewers) if reviewers.is_file() else ()
        reviews = _Table(scratch, "reviews", ((str(record.get("asin")), record) for _, record in found))
        self._human_products = len(human)
        records = islice(read_array(catalogue), self.products)
        return join(records, catalogue, attributes, human, reviews)

    def _files(self) -> list[Path]:
        """Catalogue and attributes first, then those of the others that are there."""
        thousand = self.products == 1000
        needed = []
        for names in (CATALOGUE_FILES, ATTRIBUTE_FILES):
            wanted = names[::-1] if thousand else names
            found = next((self.folder / name for name in wanted if (self.folder / name).is_file()), None)
            if found is None:
                raise ValueError(
                    f"WebShop's data are not in {self.folder}: it has no {' or '.join(names)}; download them (the "
                    "setup.sh of princeton-nlp/WebShop names the addresses), set data_dir "
                    "(default $WEBSHOP_DATA) to their folder, or use catalogue: generated"
                )
            needed.append(found)
        return needed + [self.folder / name for name in (HUMAN_FILE, REVIEW_FILE) if (self.folder / name).is_file()]


def read_array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON array of any size, one at a time, with their numbers, from 1.

    Raises:
        ValueError: the file is missing, no JSON array, damaged, or an entry is no object; names file and record.
    """
    for number, record in enumerate(_stream(path, r"\[\s*[{\]]", "array of objects", ijson.items, "item"), start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {number} is a JSON {type(record).__name__}, not an object")
        yield number, record


def read_object(path: Path) -> Iterator[tuple[str, Any]]:
    """Keys and values of a JSON object of any size, one at a time.

    Raises:
        ValueError: the file is missing, no JSON object, or damaged; says after how many entries.
    """
    return _stream(path, r"\{", "object", ijson.kvitems, "")


def _stream(path: Path, start: str, what: str, read: Callable[..., Iterator[Any]], prefix: str) -> Iterator[Any]:
    count = 0
    try:
        with path.open("rb") as file:
            if not re.match(rf"\s*{start}".encode(), file.read(4096)):
                raise ValueError(f"{path} is no JSON {what}: download or generate the file again")
            file.seek(0)
            for entry in read(file, prefix, use_float=True):
                yield entry
                count += 1
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ijson.JSONError as error:
        raise ValueError(
            f"{path} is not valid JSON, or cut off, after {count} entries ({' '.join(str(error).split())}); "
            "download or generate the file again"
        ) from error


class _Table(Mapping[str, Any]):
    """Entries of a large file by name: the names in memory, what they stand for in a scratch file."""

    def __init__(self, scratch: Path, name: str, entries: Iterable[tuple[str, Any]]) -> None:
        writer = BlobWriter(scratch, name)
        self._numbers: dict[str, int] = {}
        for number, (key, value) in enumerate(entries):
            self._numbers[key] = number
            writer.add(json.dumps(value).encode())
        writer.finish()
        self._values = Blobs(scratch, name)

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._values[self._numbers[key]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def join(
    records: Iterable[tuple[int, Mapping[str, Any]]],
    origin: object,
    attributes: Mapping[str, Any],
    human: Mapping[str, Any],
    reviews: Mapping[str, Any],
) -> Iterator[Entry]:
    """Put together what the files say about each product.

    Args:
        records: numbered records of the catalogue file.
        origin: what to call it in errors.
        attributes: content of ``items_ins_v2.json``.
        human: content of ``items_human_ins.json``.
        reviews: content of ``reviews.json`` by asin.

    Yields:
        Each product once, at its first record; records without a usable asin are passed over.

    Raises:
        ValueError: a record or an instruction lacks what is needed; the message names it.
    """
    seen: set[str] = set()
    for number, record in records:
        asin = str(record.get("asin")).strip()
        if asin in seen:
            continue
        notes = attributes.get(asin)
        notes = notes if isinstance(notes, Mapping) else {}
        try:
            product = read_product(record, notes.get("attributes"), reviews.get(asin))
            if product is None:
                continue
            written = human.get(asin) or []
            people = tuple(_instruction(item, "instruction_options") for item in written)
            rule = _instruction(notes) if notes.get("instruction") else None
        except RecordError as error:
            raise ValueError(f"{origin}, record {number} (asin {asin}): {error}") from error
        seen.add(asin)
        yield Entry(product, people, rule)


def _instruction(item: object, options_key: str = "") -> Instruction:
    if not isinstance(item, Mapping) or not isinstance(item.get("instruction"), str):
        raise RecordError("its instruction is no object with an 'instruction'")
    options = item.get(options_key) or [] if options_key else []
    options = list(options.values()) if isinstance(options, Mapping) else options
    attributes = item.get("instruction_attributes") or []
    if not isinstance(attributes, list) or not isinstance(options, list):
        raise RecordError("its instruction's attributes or options are no list")
    text = " ".join(item["instruction"].split())
    return Instruction(text, tuple(map(str, attributes)), tuple(map(str, options)))

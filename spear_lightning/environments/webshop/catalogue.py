"""A catalogue on disk: products, prices, goals and the search index, mapped into memory and shared by all processes."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from spear_lightning.environments.webshop.arrays import Blobs, BlobWriter, read_array, save_array
from spear_lightning.environments.webshop.goals import (
    GOAL_KINDS,
    Goal,
    GoalKind,
    Instruction,
    human_goal,
    published_order,
    synthetic_goal,
    variants,
)
from spear_lightning.environments.webshop.prices import draw_price, draw_price_cap
from spear_lightning.environments.webshop.records import Product
from spear_lightning.environments.webshop.search import IndexBuilder, SearchIndex
from spear_lightning.environments.webshop.sources import Entry, Source
from spear_lightning.utils.atomic import make_once
from spear_lightning.utils.randomness import stream_seed

FORMAT = 1  # raise when equal sources come out differently
_META = "catalogue.json"
_RECENT = 2048  # products kept parsed in a process


def build_catalogue(root: Path, source: Source) -> Path:
    """Build a catalogue unless it is there already.

    Args:
        root: folder of catalogues.
        source: of products and instructions.

    Returns:
        The catalogue's folder; it is complete, whatever number of processes asked for it.

    Raises:
        ValueError: the source is broken or has no product, or the folder cannot be written; the message says what.
    """
    name = f"{source.key}-{FORMAT}"
    try:
        return make_once(root, name, _META, lambda folder: _build(folder, source))
    except OSError as error:
        raise ValueError(f"cannot write the WebShop catalogue under {root} ({error}): set cache_dir") from error


def _build(folder: Path, source: Source) -> None:
    scratch = folder / "scratch"
    scratch.mkdir()
    records, index = BlobWriter(folder, "records"), IndexBuilder(folder)
    goals = _GoalLists()
    categories: dict[str, int] = {}
    departments, prices = array("i"), array("d")
    with_human = 0
    for number, entry in enumerate(source.entries(scratch)):
        product = entry.product
        card = f"{product.asin}\t{product.price_tag}\t{product.title}\n"
        records.add(card.encode("utf-8", "replace") + json.dumps(asdict(entry)).encode())
        index.add(product.search_text)
        prices.append(draw_price(product.prices, stream_seed("webshop price", product.asin)))
        departments.append(categories.setdefault(product.category, len(categories)))
        goals.add(number, entry)
        with_human += bool(entry.human)
    if not prices:
        raise ValueError(f"the WebShop catalogue has no product ({source.key}): every record was passed over")
    records.finish()
    index.finish()
    goals.save(folder)
    save_array(folder, "prices", np.asarray(prices))
    save_array(folder, "departments", np.asarray(departments, np.int32))
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    meta = {
        "products": len(prices),
        "categories": list(categories),
        "left_out": {
            "instructions without attributes": goals.without_attributes,
            "products with instructions that are not in the catalogue": source.human_products() - with_human,
        },
    }
    (folder / _META).write_text(json.dumps(meta, indent=1))


class _GoalLists:
    """Product and variant of every goal, by kind, in the order of the catalogue."""

    def __init__(self) -> None:
        self._pairs = {kind: array("i") for kind in GOAL_KINDS}  # product and place in turn
        self.without_attributes = 0

    def add(self, number: int, entry: Entry) -> None:
        for place, instruction in enumerate(entry.human):
            if instruction.attributes:
                self._pairs["human"].extend((number, place))
            else:
                self.without_attributes += 1
        if entry.synthetic is None:
            return
        if not entry.synthetic.attributes:
            self.without_attributes += 1
            return
        for place in range(variants(entry.product.options)):
            self._pairs["synthetic"].extend((number, place))

    def save(self, folder: Path) -> None:
        for kind, pairs in self._pairs.items():
            table = np.asarray(pairs, np.int32).reshape(-1, 2)
            save_array(folder, f"goals_{kind}", table[np.asarray(published_order(len(table)))])


class Catalogue:
    """A built catalogue.

    Args:
        folder: that :func:`build_catalogue` returned.

    Attributes:
        search: finds products by words.
        left_out: how many instructions and products were passed over, by reason.
    """

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / _META).read_text())
        self.left_out: dict[str, int] = meta["left_out"]
        self._categories: list[str] = meta["categories"]
        self._records = Blobs(folder, "records")
        self._prices = read_array(folder, "prices")
        self._departments = read_array(folder, "departments")
        self._goals = {kind: read_array(folder, f"goals_{kind}") for kind in GOAL_KINDS}
        self.search = SearchIndex(folder)
        self.entry = lru_cache(maxsize=_RECENT)(self._entry)
        self.card = lru_cache(maxsize=8 * _RECENT)(self._card)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Product]:
        return (self._entry(number).product for number in range(len(self)))

    def price(self, number: int) -> float:
        """What a product costs, in dollars."""
        return float(self._prices[number])

    def goals(self, kind: GoalKind) -> int:
        """How many goals there are."""
        return len(self._goals[kind])

    def department(self, kind: GoalKind, number: int) -> str:
        """The category of a goal's product."""
        return self._categories[int(self._departments[int(self._goals[kind][number, 0])])]

    def goal(self, kind: GoalKind, number: int) -> Goal:
        """A goal, by its number in the published order."""
        product, place = (int(value) for value in self._goals[kind][number])
        entry = self.entry(product)
        # A product's synthetic goals share a cap, as in the original; each human one has its own.
        own = place if kind == "human" else 0
        cap = draw_price_cap(self.price(product), stream_seed("webshop cap", kind, entry.product.asin, own))
        if kind == "human":
            return human_goal(entry.product, entry.human[place], cap)
        if entry.synthetic is None:
            raise RuntimeError(f"goal {number} is about a product without an instruction: the catalogue is damaged")
        return synthetic_goal(entry.product, entry.synthetic, place, cap)

    def _entry(self, number: int) -> Entry:
        """A product with its instructions."""
        content: dict[str, Any] = json.loads(self._records[number].partition(b"\n")[2])
        return Entry(
            Product(**content["product"]),
            tuple(_read_instruction(item) for item in content["human"]),
            _read_instruction(content["synthetic"]) if content["synthetic"] else None,
        )

    def _card(self, number: int) -> tuple[str, str, str]:
        """Asin, price tag and title of a product, as a list of results shows them."""
        asin, price, title = self._records[number].partition(b"\n")[0].decode().split("\t", 2)
        return asin, price, title


def _read_instruction(item: dict[str, Any]) -> Instruction:
    return Instruction(item["text"], tuple(item["attributes"]), tuple(item["options"]))

"""A catalogue out of templates, in the official formats: no download, equal seeds give equal files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_lightning.environments.webshop.kinds import KINDS, Kind
from spear_lightning.environments.webshop.sources import (
    ATTRIBUTE_FILES,
    CATALOGUE_FILES,
    HUMAN_FILE,
    REVIEW_FILE,
    Entry,
    Source,
    digest,
    join,
)
from spear_lightning.utils.package_data import read_yaml
from spear_lightning.utils.randomness import stream_seed

_VERSION = 1  # raise when equal seeds give other products
_DATA = read_yaml(__name__, "generator.yaml")
_SYLLABLES, _OPENINGS, _PRAISE = _DATA["syllables"], _DATA["openings"], _DATA["praise"]
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPRSTVWXZ", "AEIOU"


@dataclass(frozen=True, slots=True)
class Draft:
    """A product as the official files spell it.

    Attributes:
        record: its entry in the catalogue file.
        notes: its entry in the file of attributes and synthetic instructions.
        human: its entry in the file of human instructions.
        reviews: its entry in the file of reviews.
    """

    record: dict[str, Any]
    notes: dict[str, Any]
    human: list[dict[str, Any]]
    reviews: dict[str, Any]


class GeneratedProducts(Source):
    """A generated catalogue.

    Args:
        products: how many.
        seed: of all that is drawn.
    """

    def __init__(self, products: int, seed: int = 0) -> None:
        self.products, self.seed = products, seed

    @property
    def key(self) -> str:
        """Number, seed and version of the templates."""
        return digest({"generated": _VERSION, "products": self.products, "seed": self.seed})

    def human_products(self) -> int:
        """All of them."""
        return self.products

    def entries(self, scratch: Path) -> Iterator[Entry]:
        """The products, through the same reader as official ones."""
        for number, draft in enumerate(self.drafts(), start=1):
            asin = draft.record["asin"]
            files = ({asin: draft.notes}, {asin: draft.human}, {asin: draft.reviews})
            yield from join([(number, draft.record)], "the generated catalogue", *files)

    def drafts(self) -> Iterator[Draft]:
        """The products as the official files spell them; kinds take turns."""
        taken: set[str] = set()
        for number in range(self.products):
            rng = random.Random(stream_seed("webshop product", self.seed, number))
            asin = _asin(rng)
            while asin in taken:
                asin = _asin(rng)
            taken.add(asin)
            yield draft(KINDS[number % len(KINDS)], asin, rng)


def draft(kind: Kind, asin: str, rng: random.Random) -> Draft:
    """Draw a product.

    Args:
        kind: of product.
        asin: its number.
        rng: of all that is drawn.
    """
    brand = "".join(rng.sample(_SYLLABLES, rng.choice((2, 2, 3)))).title()
    attributes = rng.sample(kind.attributes, rng.randint(3, 5))
    options = {
        name: sorted(rng.sample(values, rng.randint(2, min(5, len(values)))), key=values.index)
        for name, values in kind.options.items()
    }
    shown, told = attributes[:2], attributes[2:]  # some can be read in the title, the others on the pages behind
    title = " ".join([brand, *(phrase.title() for phrase in shown), kind.noun.title()])
    bullets = [f"{phrase}: a {kind.noun} that keeps its word" for phrase in told[:2]]
    description = f"{brand} makes this {kind.noun} for every day. It is {_listed(attributes)}."
    record = {
        "asin": asin,
        "name": title,
        "category": kind.category,
        "query": kind.noun,
        "product_category": " › ".join(kind.path),
        "pricing": _pricing(kind.cost, rng),
        "full_description": description,
        "small_description": [*bullets, f"a {kind.noun} by {brand}"],
        "images": [f"{asin}.jpg"],
        "customization_options": {
            name: [{"value": value, "image": None} for value in values] for name, values in options.items()
        },
    }
    wanted = rng.sample(attributes, rng.randint(1, 2))
    notes = {
        "attributes": attributes,
        "instruction": f"{rng.choice(_OPENINGS)} {_listed(wanted)} {kind.noun}",
        "instruction_attributes": wanted,
    }
    human = [_human(kind, attributes, options, rng) for _ in range(3)]
    return Draft(record, notes, human, _reviews(asin, rng))


def write_official_layout(folder: Path, products: int, seed: int = 0) -> None:
    """Write a generated catalogue as the official files, for tests and for tools that expect them.

    Args:
        folder: to write to; made if need be.
        products: how many.
        seed: of the catalogue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = GeneratedProducts(products, seed)
    _write(folder / CATALOGUE_FILES[0], "[]", (json.dumps(item.record) for item in source.drafts()))
    for name, pairs in (
        (ATTRIBUTE_FILES[0], ((item.record["asin"], item.notes) for item in source.drafts())),
        (HUMAN_FILE, ((item.record["asin"], item.human) for item in source.drafts())),
    ):
        _write(folder / name, "{}", (f"{json.dumps(asin)}: {json.dumps(value)}" for asin, value in pairs))
    _write(folder / REVIEW_FILE, "[]", (json.dumps(item.reviews) for item in source.drafts()))


def _write(path: Path, brackets: str, entries: Iterator[str]) -> None:
    """Write entries one at a time: a large catalogue does not fit into memory twice."""
    with path.open("w", encoding="utf-8") as file:
        file.write(brackets[0])
        for number, entry in enumerate(entries):
            file.write(f"{', ' if number else ''}{entry}")
        file.write(brackets[1])


def _asin(rng: random.Random) -> str:
    """Letters only, and it can be said: a small word-level policy reads it as one word."""
    return "B" + "".join(rng.choice(_CONSONANTS if place % 2 else _VOWELS) for place in range(9))


def _listed(phrases: Sequence[str]) -> str:
    return " and ".join(phrases) if len(phrases) < 3 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _pricing(cost: tuple[float, float], rng: random.Random) -> str | None:
    """Mostly one price, sometimes a range, rarely none."""
    low, high = cost
    price = low + (high - low) * rng.random() ** 2
    draw = rng.random()
    if draw < 0.02:
        return None
    return f"${price:.2f}" if draw < 0.9 else f"${price:.2f}${price * 1.2:.2f}"


def _human(kind: Kind, attributes: Sequence[str], options: dict[str, list[str]], rng: random.Random) -> dict[str, Any]:
    wanted = rng.sample(attributes, rng.randint(1, 2))
    names = rng.sample(sorted(options), rng.randint(1, len(options)))
    values = [rng.choice(options[name]) for name in names]
    asked = ", and ".join(
        f"the {name} should be {value}" if rng.random() < 0.5 else f"i want the {value} {name}"
        for name, value in zip(names, values, strict=True)
    )
    return {
        "instruction": f"{rng.choice(_OPENINGS)} a {kind.noun} that is {_listed(wanted)}, {asked}.",
        "instruction_attributes": wanted,
        "instruction_options": values,
    }


def _reviews(asin: str, rng: random.Random) -> dict[str, Any]:
    found = [
        {"title": rng.choice(_PRAISE), "stars": f"{rng.randint(1, 5)}.0", "review": rng.choice(_PRAISE)}
        for _ in range(rng.randint(0, 3))
    ]
    average = f"{sum(float(review['stars']) for review in found) / len(found):.1f}" if found else "N.A."
    return {"asin": asin, "average_rating": average, "reviews": found}

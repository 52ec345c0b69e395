"""A product as the shop knows it, out of a record in the official format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spear_lightning.environments.webshop.prices import read_prices

LONGEST_ASIN = 10  # characters; longer ones are dropped, as in the original
NO_ATTRIBUTES = ("DUMMY_ATTR",)  # what the original puts where a product has none


class RecordError(ValueError):
    """A record lacks what the shop needs."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product.

    Attributes:
        asin: its number, in upper case as on the pages.
        title: its name.
        category: department (``beauty``, ``fashion``, …).
        query: what shoppers type for products of this kind.
        product_category: path of categories, separated by ``›``.
        prices: one price in dollars, or the two ends of a range.
        description: in full.
        bullets: features.
        options: values by option name, in lower case.
        attributes: phrases that hold for it.
        reviews: ``(title, score of 5, text)`` of each.
        rating: average score as shown, ``N.A.`` for none.
    """

    asin: str
    title: str
    category: str
    query: str
    product_category: str
    prices: list[float]
    description: str
    bullets: list[str]
    options: dict[str, list[str]]
    attributes: list[str]
    reviews: list[list[str]]
    rating: str = "N.A."

    @property
    def price_tag(self) -> str:
        """Price as shown: ``"$12.99"``, or ``"$12.99 to $24.5"``."""
        return " to ".join(f"${price}" for price in self.prices)

    @property
    def search_text(self) -> str:
        """What search looks at: title, description, first bullet and options."""
        options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in self.options.items())
        return " ".join([self.title, self.description, *self.bullets[:1], options])

    def reward_view(self) -> dict[str, Any]:
        """The product by the names that :func:`~.reward.purchase_reward` reads."""
        return {
            "query": self.query,
            "product_category": self.product_category,
            "name": self.title,
            "Title": self.title,
            "Attributes": self.attributes,
            "BulletPoints": self.bullets,
            "Description": self.description,
        }


def read_product(
    record: Mapping[str, Any], attributes: object = None, reviews: Mapping[str, Any] | None = None
) -> Product | None:
    """A product out of an entry of ``items_shuffle*.json``.

    Args:
        record: the entry.
        attributes: the product's attributes from ``items_ins_v2.json``, if it has any there.
        reviews: the product's entry in ``reviews.json``, if there is one.

    Returns:
        ``None`` for a record without a usable asin (empty, ``nan``, more than 10 characters).

    Raises:
        RecordError: a needed entry is missing or of the wrong kind; the message names it.
    """
    asin = _text(record, "asin")
    if not asin or asin == "nan" or len(asin) > LONGEST_ASIN:
        return None
    bullets = record.get("small_description") or []
    return Product(
        asin=asin.upper(),
        title=_text(record, "name"),
        category=_text(record, "category"),
        query=_text(record, "query").lower(),
        product_category=_text(record, "product_category"),
        prices=read_prices(record.get("pricing")),
        description=_plain(record.get("full_description")),
        bullets=[_plain(bullet) for bullet in (bullets if isinstance(bullets, list) else [bullets])],
        options=_options(record.get("customization_options")),
        attributes=[str(phrase) for phrase in attributes] if isinstance(attributes, list) else list(NO_ATTRIBUTES),
        reviews=[_review(review) for review in (reviews or {}).get("reviews") or []],
        rating=_plain((reviews or {}).get("average_rating")) or "N.A.",
    )


def _plain(value: object) -> str:
    """One line of text."""
    return " ".join(str(value).split()) if value is not None else ""


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(f"{key!r} is {'missing' if value is None else f'a {type(value).__name__}, not text'}")
    return _plain(value)


def _options(customization: object) -> dict[str, list[str]]:
    """Option values by name; ``/`` becomes `` | ``, as in the original, where it would break an address."""
    if not customization:
        return {}
    if not isinstance(customization, Mapping):
        raise RecordError(f"'customization_options' is a {type(customization).__name__}, not an object")
    options: dict[str, list[str]] = {}
    for name, contents in customization.items():
        if contents is None:
            continue
        try:
            values = [_plain(str(content["value"]).replace("/", " | ")).lower() for content in contents]
        except (TypeError, KeyError) as error:
            raise RecordError(f"option {name!r} is no list of objects with a 'value'") from error
        options[_plain(name).lower()] = list(dict.fromkeys(value for value in values if value))
    return {name: values for name, values in options.items() if values}


def _review(review: Mapping[str, Any]) -> list[str]:
    return [_plain(review.get("title")), _plain(review.get("stars", review.get("score"))), _plain(review.get("review"))]

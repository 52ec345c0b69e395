"""The shop's pages as text, and what can be clicked on them; made from data, never from HTML.

A page reads as in the original's simple text mode: its visible pieces one after the other with ``[SEP]`` between.
Chosen options, which that mode does not show, are told first, as its rich mode does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spear_lightning.environments.webshop.records import Product

PER_PAGE = 10  # of the published shop
MOST_HITS = 50
SEARCH_ACTION = "search[<your query>]"
"""Stands for every search in lists of admissible actions, as in the published prompts."""

BACK_TO_SEARCH, NEXT_PAGE, PREVIOUS, BUY = "Back to Search", "Next >", "< Prev", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")


@dataclass(frozen=True, slots=True)
class Page:
    """A page.

    Attributes:
        text: what is read.
        clicks: what can be clicked, in lower case, in the order of the page.
        searchable: whether it has a search bar.
    """

    text: str
    clicks: tuple[str, ...] = ()
    searchable: bool = False

    @property
    def admissible(self) -> list[str]:
        """The actions that the page offers."""
        clicks = [f"click[{name}]" for name in self.clicks]
        return [SEARCH_ACTION, *clicks] if self.searchable else clicks


@dataclass(slots=True)
class _Lines:
    """Collects the pieces of a page."""

    pieces: list[str] = field(default_factory=list)
    clicks: dict[str, None] = field(default_factory=dict)  # each once, in order

    def say(self, *texts: str) -> None:
        self.pieces += texts

    def button(self, *labels: str) -> None:
        for label in labels:
            self.pieces.append(label)
            self.clicks[label.lower()] = None

    def page(self) -> Page:
        return Page(" [SEP] ".join(self.pieces), tuple(self.clicks))


def search_page() -> Page:
    """The first page."""
    return Page("WebShop [SEP] Search", (), searchable=True)


def results_page(cards: Sequence[tuple[str, str, str]], number: int, total: int, per_page: int = PER_PAGE) -> Page:
    """A list of hits.

    Args:
        cards: asin, price tag and title of the hits on this page.
        number: of the page, from 1.
        total: number of hits on all pages.
        per_page: hits on a full page.
    """
    lines = _Lines()
    lines.button(BACK_TO_SEARCH)
    lines.say(f"Page {number} (Total results: {total})")
    if number > 1:
        lines.button(PREVIOUS)
    if number * per_page < total:
        lines.button(NEXT_PAGE)
    for asin, price, title in cards:
        lines.button(asin)
        lines.say(title, price)
    return lines.page()


def item_page(product: Product, chosen: Mapping[str, str]) -> Page:
    """A product with its options.

    Args:
        product: to show.
        chosen: chosen value by option name.
    """
    lines = _Lines()
    lines.say(*(f"You have clicked {value}." for value in chosen.values()))
    lines.button(BACK_TO_SEARCH, PREVIOUS)
    for name, values in product.options.items():
        lines.say(name)
        lines.button(*values)
    lines.say(product.title, f"Price: {product.price_tag}", f"Rating: {product.rating}")
    lines.button(*SUB_PAGES, BUY)
    return lines.page()


def sub_page(product: Product, name: str) -> Page:
    """More about a product.

    Args:
        product: to show.
        name: one of :data:`SUB_PAGES`.
    """
    lines = _Lines()
    lines.button(BACK_TO_SEARCH, PREVIOUS)
    if name == "Description":
        lines.say(product.description or "No Description")
    elif name == "Features":
        lines.say(*(product.bullets or ["No Features"]))
    else:
        for title, score, text in product.reviews:
            lines.say(f'"{title}"', score, text)
        if not product.reviews:
            lines.say("No reviews found")
    return lines.page()


def done_page(score: float) -> Page:
    """The page after a purchase.

    Args:
        score: its reward.
    """
    return Page(f"Thank you for shopping with us! [SEP] Your score (min 0.0, max 1.0) [SEP] {score}")

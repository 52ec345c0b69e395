"""A scripted shopper that sees what a language model would see: the text of the pages, and nothing else.

It searches for what the instruction asks, opens the affordable hits whose titles say most of it, reads on where
something is missing, picks the options that were asked for, and buys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from typing_extensions import override

from spear_lightning.environments.expert import Expert
from spear_lightning.utils.package_data import read_yaml

_DATA = read_yaml(__name__, "expert.yaml")
_CAP = re.compile(r",? and price lower than (\d+(?:\.\d+)?) dollars")
_LISTED = re.compile(r" with ((?:(?! with )[^:])+: .*)$")
_SAID = re.compile(r"the (\w+) should be ([^,]+)|i want the ([^,]+) (\w+)(?=,|$)")
_PRICE = re.compile(r"\$(\d+(?:\.\d+)?)")
_ASIN = re.compile(r"[A-Z0-9]{10}")
_WORD = re.compile(r"[a-z0-9]+(?:[.'-][a-z0-9]+)*")
_FILLERS = frozenset(_DATA["fillers"])
_OPTION_NAMES = frozenset(_DATA["option_names"])
_PATIENCE = 9  # moves after which it buys what it has found, good or not: episodes have 15 steps
_MOST_PAGES = 3  # of results that it looks through


@dataclass(frozen=True, slots=True)
class Order:
    """What an instruction asks for.

    Attributes:
        words: all words that matter, in order, each once.
        pairs: option values by name, where the instruction names them like that.
        text: the instruction in lower case, without the price.
        cap: the most it may cost, in dollars.
    """

    words: tuple[str, ...]
    pairs: dict[str, str]
    text: str
    cap: float

    @classmethod
    def parse(cls, task: str) -> Order:
        """Read an instruction.

        Raises:
            ValueError: it says nothing.
        """
        text = " ".join(task.lower().split())
        cap = _CAP.search(text)
        text = _CAP.sub("", text).strip(" .")
        pairs = _pairs(text)
        names = {word for name in (*pairs, *_OPTION_NAMES) for word in name.split()}
        words = (word for word in _WORD.findall(text) if word not in _FILLERS and word not in names)
        order = cls(tuple(dict.fromkeys(words)), pairs, text, float(cap[1]) if cap else float("inf"))
        if not order.words:
            raise ValueError(f"The shopping expert finds nothing to buy in the task {task!r}.")
        return order


def _pairs(text: str) -> dict[str, str]:
    """Option values that an instruction gives by name: ``with color: red, and size: 6``, ``the size should be 6``."""
    if listed := _LISTED.search(text):
        parts = (part.partition(": ") for part in listed[1].split(", and "))
        return {name: value for name, _, value in parts if value}
    said = ((first or last, value or other) for first, value, other, last in _SAID.findall(text))
    return {name: value.strip() for name, value in said if name in _OPTION_NAMES}


@dataclass(slots=True)
class _Hit:
    """A line of a list of results."""

    asin: str
    title: str
    lowest: float
    highest: float


@dataclass(slots=True)
class _Item:
    """What was read about the product that is open."""

    groups: dict[str, list[str]] = field(default_factory=dict)
    chosen: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)  # sub-pages


class ShoppingExpert(Expert):
    """Shops for one goal at a time from text alone.

    It writes ``click[ red ]`` with spaces inside the brackets, which the shop does not mind: so ``red`` is the same
    token in an action as on a page, and a small policy can copy it.

    Args:
        seed: of all noise.
        noise: how demonstrations stray: a detour opens another hit, waste reads a page that need not be read, a
            mistake picks a wrong option, an invalid action clicks what is not there. By default not at all.

    Attributes:
        motive: why the latest action was chosen.
    """

    phrases = tuple(_DATA["phrases"])
    names = False  # "pack of 3", "blue 15 feet": a number belongs to no word

    @override
    def reset(self, task: str, observation: str) -> None:
        self._order = Order.parse(task)
        self._item = _Item()
        self._hits: list[_Hit] = []
        self._opened: list[str] = []
        self._page, self._moves, self._more = 1, 0, False

    @override
    def act(self, observation: str = "") -> str:
        pieces = [piece.strip() for piece in observation.split("[SEP]")]
        place = self._place = _place(pieces)
        if place == "results":
            self._read_results(pieces)
        elif place == "item":
            self._read_item(pieces)
        elif place == "sub":
            self._item.words.update(_WORD.findall(" ".join(pieces[2:]).lower()))
        self._moves += 1
        action = self._choose()
        self._note(action)
        return action

    @override
    def overrule(self, action: str) -> None:
        self.motive = "invalid"
        self._note(action)

    # -- reading ------------------------------------------------------------------------------------------------

    def _note(self, action: str) -> None:
        """Remember what an action opens."""
        label = action.partition("[")[2].strip(" ]").lower()
        if any(hit.asin.lower() == label for hit in self._hits):
            self._opened.append(label)
            self._item = _Item()
        if label in ("description", "features"):
            self._item.read.add(label)

    def _read_results(self, pieces: list[str]) -> None:
        counter = next(place for place, piece in enumerate(pieces) if "(Total results:" in piece)
        self._page = int(re.sub(r"\D", "", pieces[counter].partition("(")[0]) or 1)
        self._more = "Next >" in pieces[: counter + 3]
        rows = pieces[counter + 1 :]
        while rows and not _ASIN.fullmatch(rows[0]):
            rows = rows[1:]
        self._hits = []
        for asin, title, price in zip(rows[::3], rows[1::3], rows[2::3], strict=False):
            costs = [float(cost) for cost in _PRICE.findall(price)] or [100.0]
            self._hits.append(_Hit(asin, title, min(costs), max(costs)))

    def _read_item(self, pieces: list[str]) -> None:
        first = pieces.index("< Prev") + 1
        last = next(place for place, piece in enumerate(pieces) if piece.startswith("Price: "))
        item = self._item
        item.chosen = {
            piece.removeprefix("You have clicked ").removesuffix(".")
            for piece in pieces[:first]
            if piece.startswith("You have clicked ")
        }
        item.groups = {}
        name = ""
        for piece in pieces[first : last - 1]:
            if piece in _OPTION_NAMES or piece in self._order.pairs or not item.groups:
                name = piece
                item.groups[name] = []
            else:
                item.groups[name].append(piece)
        item.words.update(_WORD.findall(" ".join(pieces[first:last]).lower()))

    # -- acting -------------------------------------------------------------------------------------------------

    @override
    def _advance(self) -> str:
        if self._place == "search":
            return f"search[ {' '.join(self._order.words)} ]"
        if self._place == "results":
            return self._open_best()
        if self._place == "sub":
            return _click("< prev")
        return self._examine()

    def _open_best(self) -> str:
        fresh = [hit for hit in self._hits if hit.asin.lower() not in self._opened]
        cap, hurry = self._order.cap, self._moves >= _PATIENCE
        affordable = [hit for hit in fresh if hit.highest <= cap] or [hit for hit in fresh if hit.lowest <= cap]
        if affordable:
            return _click(affordable[0].asin.lower())
        if self._more and self._page < _MOST_PAGES and not hurry:
            return _click("next >")
        if not self._hits:
            return _click("back to search")
        return _click((fresh or self._hits)[0].asin.lower())

    def _examine(self) -> str:
        """Read on, go back, choose an option, or buy."""
        item, hurry = self._item, self._moves >= _PATIENCE
        picks = self._picks()
        unknown = [word for word in self._order.words if word not in item.words]
        lacking = [name for name, value in self._order.pairs.items() if value not in picks.values() and name]
        if lacking and not hurry:
            return _click("< prev")
        if unknown and not hurry:
            unread = [name for name in ("features", "description") if name not in item.read]
            return _click(unread[0]) if unread else _click("< prev")
        for value in picks.values():
            if value not in item.chosen:
                return _click(value)
        return _click("buy now")

    def _picks(self) -> dict[str, str]:
        """The value to choose of each option that the instruction speaks of."""
        picks = {}
        for name, values in self._item.groups.items():
            wanted = self._order.pairs.get(name)
            if wanted is not None:
                named = [value for value in values if value == wanted]
            else:
                named = [value for value in values if re.search(rf"(?<!\S){re.escape(value)}(?!\S)", self._order.text)]
            if named:
                picks[name] = max(named, key=len)
        return picks

    # -- straying -----------------------------------------------------------------------------------------------

    @override
    def _detours(self) -> list[str]:
        return [_click(hit.asin.lower()) for hit in self._hits] if self._place == "results" else []

    @override
    def _wasted_moves(self) -> list[str]:
        return [_click("description"), _click("features")] if self._place == "item" else []

    @override
    def _mistakes(self) -> list[str]:
        if self._place != "item":
            return []
        picks, groups = self._picks(), self._item.groups
        return [_click(value) for name, values in groups.items() for value in values if value != picks.get(name)]

    @override
    def _invalid_actions(self) -> list[str]:
        return [_click("next >" if self._place == "item" else "buy now")]


def _click(label: str) -> str:
    return f"click[ {label} ]"


def _place(pieces: list[str]) -> str:
    """Which kind of page this is."""
    if pieces[-1] == "Buy Now":
        return "item"
    if any(piece.startswith("Page ") and "(Total results:" in piece for piece in pieces):
        return "results"
    return "search" if pieces[-1] in ("Search", "") and len(pieces) <= 2 else "sub"

"""A shopper's way through the pages."""

from __future__ import annotations

import re
from typing import Literal

from spear_lightning.environments.webshop import pages
from spear_lightning.environments.webshop.catalogue import Catalogue
from spear_lightning.environments.webshop.goals import Goal
from spear_lightning.environments.webshop.pages import Page
from spear_lightning.environments.webshop.records import Product
from spear_lightning.environments.webshop.reward import PurchaseReward, purchase_reward

_LONGEST_ACTION = 4096  # characters; a longer one is not looked at
_ACTION = re.compile(r"\s*(search|click)\s*\[(.*)\]\s*", re.IGNORECASE | re.DOTALL)
_SUB_PAGES = {name.lower(): name for name in pages.SUB_PAGES}
_BACK, _NEXT, _PREVIOUS, _BUY = (
    label.lower() for label in (pages.BACK_TO_SEARCH, pages.NEXT_PAGE, pages.PREVIOUS, pages.BUY)
)
Place = Literal["search", "results", "item", "sub", "done"]


def parse_action(text: object) -> tuple[str, str] | None:
    """What an action says: ``search`` or ``click``, and the words in the outermost brackets, in lower case.

    Args:
        text: as a model wrote it.

    Returns:
        ``None`` for anything else.
    """
    if not isinstance(text, str) or len(text) > _LONGEST_ACTION:
        return None
    match = _ACTION.fullmatch(text)
    words = " ".join(match[2].lower().split()) if match else ""
    return (match[1].lower(), words) if match and words else None


class Session:
    """One shopper with one goal.

    Args:
        catalogue: of the shop.
        goal: what is to be bought.
        per_page: hits on a page of results.

    Attributes:
        page: what the shopper sees.
        purchase: the reward, once something was bought.
    """

    def __init__(self, catalogue: Catalogue, goal: Goal, per_page: int = pages.PER_PAGE) -> None:
        self._catalogue, self._goal, self._per_page = catalogue, goal, per_page
        self._place: Place = "search"
        self._hits: list[int] = []
        self._number = 1
        self._product = -1
        self._chosen: dict[str, str] = {}
        self.page: Page = pages.search_page()
        self.purchase: PurchaseReward | None = None

    def act(self, text: object) -> bool:
        """Carry out an action; one that is not understood, or not possible here, leaves everything as it is.

        Args:
            text: ``search[words]``, which is possible everywhere, or ``click[label]``.

        Returns:
            Whether it was carried out.
        """
        action = parse_action(text)
        if action is None or self._place == "done":
            return False
        verb, words = action
        if verb == "search":
            self._hits = [int(hit) for hit in self._catalogue.search.search(words, pages.MOST_HITS)]
            self._show_results(1)
            return True
        if words not in self.page.clicks:
            return False
        self._click(words)
        return True

    def _click(self, label: str) -> None:
        """Follow a link of the page. Buttons go before options of the same name, as in the original."""
        if label == _BACK:
            self._place, self.page = "search", pages.search_page()
            self._chosen = {}
        elif label in (_NEXT, _PREVIOUS) and self._place == "results":
            self._show_results(self._number + (1 if label == _NEXT else -1))
        elif label == _PREVIOUS and self._place == "item":
            self._show_results(self._number)
        elif label == _PREVIOUS:
            self._show_item()
        elif self._place == "results":
            self._open(label)
        elif label in _SUB_PAGES:
            self._place, self.page = "sub", pages.sub_page(self._shown, _SUB_PAGES[label])
        elif label == _BUY:
            self._buy()
        else:
            self._choose(label)

    def _show_results(self, number: int) -> None:
        self._place, self._number, self._chosen = "results", number, {}
        cards = [self._catalogue.card(hit) for hit in self._hits_shown]
        self.page = pages.results_page(cards, number, len(self._hits), self._per_page)

    def _open(self, label: str) -> None:
        self._product = next(hit for hit in self._hits_shown if self._catalogue.card(hit)[0].lower() == label)
        self._show_item()

    def _show_item(self) -> None:
        self._place, self.page = "item", pages.item_page(self._shown, self._chosen)

    def _choose(self, value: str) -> None:
        # A value that several options have belongs to the last of them, as in the original.
        names = [name for name, values in self._shown.options.items() if value in values]
        self._chosen[names[-1]] = value
        self._show_item()

    def _buy(self) -> None:
        self.purchase = purchase_reward(
            self._shown.reward_view(),
            self._goal.reward_view(),
            price=self._catalogue.price(self._product),
            options=self._chosen,
        )
        self._place, self.page = "done", pages.done_page(self.purchase.total)

    @property
    def _hits_shown(self) -> list[int]:
        first = (self._number - 1) * self._per_page
        return self._hits[first : first + self._per_page]

    @property
    def _shown(self) -> Product:
        return self._catalogue.entry(self._product).product

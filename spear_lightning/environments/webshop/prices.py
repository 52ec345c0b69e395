"""Prices in dollars: out of the catalogue's text, and the caps that goals put on them."""

from __future__ import annotations

import random
import re

DEFAULT_PRICE = 100.0  # dollars, where the catalogue names none
NO_CAP = 1_000_000.0  # dollars
_STEPS = tuple(10.0 * step for step in range(1, 100))
_CHOICE = 4  # steps above the price that a cap is drawn from
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")


def read_prices(pricing: object) -> list[float]:
    """The prices in a record's ``pricing``: one, or the two ends of a range.

    Args:
        pricing: for example ``"$12.99"``, ``"$12.99$24.50"`` or nothing.

    Returns:
        One or two prices; $100 where none can be read.
    """
    parts = str(pricing or "").split("$")[1:]
    found = [float(number[0]) for part in parts if (number := _NUMBER.search(part.replace(",", "")))]
    return found[:2] or [DEFAULT_PRICE]


def draw_price(prices: list[float], seed: int) -> float:
    """What is paid: the price, or one drawn from its range."""
    return prices[0] if len(prices) == 1 else random.Random(seed).uniform(*prices)


def draw_price_cap(price: float, seed: int) -> float:
    """The most a goal lets a product cost: the larger of two of the next four multiples of $10 above its price.

    Args:
        price: of the product that the goal is about.
        seed: of the draw.

    Returns:
        At least $20 for the cheapest product; :data:`NO_CAP` where fewer than two multiples are left below $1000.
    """
    above = [step for step in _STEPS if step > price][:_CHOICE]
    return max(random.Random(seed).sample(above, 2)) if len(above) >= 2 else NO_CAP


def price_clause(cap: float) -> str:
    """How an instruction states a cap; empty for :data:`NO_CAP`."""
    return "" if cap >= NO_CAP else f", and price lower than {cap:.2f} dollars"

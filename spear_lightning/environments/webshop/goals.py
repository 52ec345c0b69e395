"""What shoppers are asked to buy: goals out of instructions, their order, and the number of each split."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spear_lightning.environments.webshop.prices import price_clause
from spear_lightning.environments.webshop.records import Product

GoalKind = Literal["human", "synthetic"]
GOAL_KINDS: tuple[GoalKind, ...] = ("human", "synthetic")
MOST_VARIANTS = 10_000  # option combinations of one product that become goals; some products have billions
_ORDER_SEED = 233  # of the original, on which the published numbers of goals rest


@dataclass(frozen=True, slots=True)
class Instruction:
    """What was written about a product.

    Attributes:
        text: the instruction, without price.
        attributes: phrases that the text asks for.
        options: option values that the text asks for; in a synthetic instruction none, there each combination of the
            product's options makes a goal.
    """

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Goal:
    """Something to be bought.

    Attributes:
        product: that the goal was written about; others may do as well.
        instruction: what the shopper reads.
        attributes: phrases asked for.
        options: values asked for, by option name in synthetic goals.
        price_cap: the most it may cost, in dollars.
    """

    product: Product
    instruction: str
    attributes: tuple[str, ...]
    options: Mapping[str, str] | Sequence[str]
    price_cap: float

    def reward_view(self) -> dict[str, Any]:
        """The goal by the names that :func:`~.reward.purchase_reward` reads."""
        return {
            "query": self.product.query,
            "product_category": self.product.product_category,
            "name": self.product.title,
            "attributes": list(self.attributes),
            "goal_options": self.options,
            "price_upper": self.price_cap,
        }


def human_goal(product: Product, instruction: Instruction, price_cap: float) -> Goal:
    """The goal of an instruction that a person wrote."""
    text = instruction.text.strip(".") + price_clause(price_cap)
    return Goal(product, text, instruction.attributes, instruction.options, price_cap)


def synthetic_goal(product: Product, instruction: Instruction, variant: int, price_cap: float) -> Goal:
    """The goal of an instruction made by rule, for one combination of options.

    Args:
        product: with its options.
        instruction: for the product.
        variant: number of the combination; the last option in the order of names changes fastest.
        price_cap: in dollars.
    """
    options = combination(product.options, variant)
    named = ", and ".join(f"{name}: {value}" for name, value in options.items())
    text = instruction.text + (f" with {named}" if named else "") + price_clause(price_cap)
    return Goal(product, text, instruction.attributes, options, price_cap)


def combination(options: Mapping[str, Sequence[str]], variant: int) -> dict[str, str]:
    """One value of each option, by number (see :func:`synthetic_goal`)."""
    chosen: dict[str, str] = {}
    for name in sorted(options, reverse=True):
        variant, place = divmod(variant, len(options[name]))
        chosen[name] = options[name][place]
    return dict(sorted(chosen.items()))


def variants(options: Mapping[str, Sequence[str]]) -> int:
    """How many combinations of options become goals; 1 for a product without options."""
    return min(math.prod(len(values) for values in options.values()), MOST_VARIANTS)


def published_order(count: int) -> array[int]:
    """The order in which goals are numbered: the original shuffles them with the seed 233.

    Args:
        count: number of goals; a large catalogue has tens of millions.
    """
    order = array("i", range(count))
    random.Random(_ORDER_SEED).shuffle(order)
    return order

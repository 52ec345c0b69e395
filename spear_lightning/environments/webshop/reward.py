"""What a purchase is worth: WebShop's reward (Yao et al., 2022, arXiv 2207.01206, §3.2).

``total = type · (attributes met + options met + [price ≤ cap]) / (attributes + options + 1)``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rapidfuzz import fuzz, utils

from spear_lightning.environments.webshop.words import normalize_color, nouns

_ALIKE = 85  # two phrases say the same above this token-set ratio (of 100)
_NO_LATIN_1 = dict.fromkeys(range(128, 256))
_CATEGORY_SEPARATOR = "›"


@dataclass(frozen=True, slots=True)
class PurchaseReward:
    """A purchase's reward and its parts, each in [0, 1].

    Attributes:
        total: the reward.
        type: whether it is the kind of product that was asked for: 1, 0.5, 0.1 or 0.
        attribute: share of the goal's attributes that the product has; 1 where the goal names none.
        option: share of the goal's options that were chosen; 1 where the goal names none.
        price: 1 if the price is within the cap, else 0.
        title_score: share of the nouns of the goal's title that the product's title has.
        query_match: the product is filed under the goal's query.
        category_match: the product shares at least two steps of its category path with the goal's.
    """

    total: float
    type: float
    attribute: float
    option: float
    price: float
    title_score: float
    query_match: bool
    category_match: bool


def purchase_reward(
    product: Mapping[str, Any], goal: Mapping[str, Any], *, price: float, options: Mapping[str, str]
) -> PurchaseReward:
    """The reward of buying a product.

    Args:
        product: what is bought: ``query``, ``product_category`` (a path, its steps separated by ``›``), ``name``,
            ``Attributes`` (list of phrases), ``Title``, ``BulletPoints`` (list), ``Description``. The last three are
            read only where an attribute is not found among ``Attributes``.
        goal: what was asked for: ``query``, ``product_category``, ``name``, ``attributes`` (list), ``goal_options``
            (list of values, or mapping of option name to value), ``price_upper`` (in dollars).
        price: of the product, in dollars.
        options: chosen value by option name.

    Raises:
        KeyError: an entry is missing.
    """
    attributes = list(goal["attributes"])
    wanted = goal["goal_options"]
    wanted = list(wanted.values() if isinstance(wanted, Mapping) else wanted)
    attributes_met = attributes_matched(product, attributes)
    options_met = options_matched(list(options.values()), wanted)
    affordable = price <= goal["price_upper"]
    query_match = product["query"] == goal["query"]
    category_match = len(_steps(product["product_category"]) & _steps(goal["product_category"])) >= 2
    score = title_score(product["name"], goal["name"])
    kind = type_reward(query_match or category_match, score)
    met = attributes_met + options_met + affordable
    return PurchaseReward(
        total=met / (len(attributes) + len(wanted) + 1) * kind,
        type=kind,
        attribute=attributes_met / len(attributes) if attributes else 1.0,
        option=options_met / len(wanted) if wanted else 1.0,
        price=float(affordable),
        title_score=score,
        query_match=query_match,
        category_match=category_match,
    )


def type_reward(same_kind: bool, title_score: float) -> float:
    """How far a product is of the kind asked for.

    Args:
        same_kind: query or category agree.
        title_score: of the titles (:func:`title_score`).

    Returns:
        0 if the titles share no noun, and 0.1 if they share less than a tenth, even where query and category agree;
        else 1 if anything agrees (a title score above 0.2 is enough), 0.5 if not.
    """
    if title_score == 0:
        return 0.0
    if title_score < 0.1:
        return 0.1
    return 1.0 if same_kind or title_score > 0.2 else 0.5


def title_score(name: str, goal_name: str) -> float:
    """Share of the nouns of ``goal_name`` that ``name`` has; 0.2 where ``goal_name`` has none."""
    wanted = nouns(goal_name)
    if not wanted:
        return 0.2
    return len(set(nouns(name)) & set(wanted)) / len(wanted)


def attributes_matched(product: Mapping[str, Any], attributes: list[str]) -> int:
    """How many attributes a product has: among its own, or word for word in title, bullets or description.

    Args:
        product: see :func:`purchase_reward`.
        attributes: phrases asked for.
    """
    own = product["Attributes"]
    return sum(any(alike(mine, wanted) for mine in own) or _mentions(product, wanted) for wanted in attributes)


def options_matched(chosen: list[str], wanted: list[str]) -> int:
    """How many wanted option values are alike to a chosen one, colours by their plain names."""
    plain = [normalize_color(value) for value in chosen]
    return sum(any(alike(mine, normalize_color(value)) for mine in plain) for value in wanted)


def alike(first: str, second: str) -> bool:
    """Whether two phrases say the same: a rounded token-set ratio above 85, case and punctuation aside."""
    ratio = fuzz.token_set_ratio(
        first.translate(_NO_LATIN_1), second.translate(_NO_LATIN_1), processor=utils.default_process
    )
    return round(ratio) > _ALIKE


def _mentions(product: Mapping[str, Any], phrase: str) -> bool:
    texts = (product["Title"], " ".join(product["BulletPoints"]), product["Description"])
    return any(phrase in text.lower() for text in texts)


def _steps(category: str) -> set[str]:
    return {step.strip() for step in category.split(_CATEGORY_SEPARATOR)}

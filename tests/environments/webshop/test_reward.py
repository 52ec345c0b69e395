"""The reward against values worked out by hand from the formula, one case for each branch of each part."""

from __future__ import annotations

from typing import Any

import pytest

from spear_lightning.environments.webshop.reward import alike, purchase_reward, title_score, type_reward
from spear_lightning.environments.webshop.words import normalize_color, nouns

PRODUCT: dict[str, Any] = {
    "query": "mens shirts",
    "product_category": "Clothing › Men › Shirts",
    "name": "Acme Cotton Shirt",
    "Title": "Acme Cotton Shirt",
    "Attributes": ["machine washable", "slim fit"],
    "BulletPoints": ["Comes with a Button Closure", "Made in Portugal"],
    "Description": "A shirt of Organic Linen.",
}
GOAL: dict[str, Any] = {
    "query": "mens shirts",
    "product_category": "Clothing › Men › Shirts",
    "name": "Acme Cotton Shirt",
    "attributes": ["machine washable", "slim fit"],
    "goal_options": {"color": "navy", "size": "large"},
    "price_upper": 40.0,
}
BOTH = {"color": "navy", "size": "large"}
OTHER_KIND = {"query": "mugs", "product_category": "Home › Kitchen › Mugs"}
FAR = {"name": "Acme Cotton Shirt Alpha Beta Gamma Delta Epsilon Zeta Eta Theta Iota"}  # twelve nouns


def nouns_of(count: int) -> str:
    """A title of so many nouns; the first one is shared by all."""
    return " ".join(["Acme", *(f"Zz{'abcdefghijklmnopqrst'[place]}" for place in range(count - 1))])


Parts = tuple[float, float, float, float, float]  # total, type, attribute, option, price
# Changes to the product, changes to the goal, price, chosen options; what the formula gives.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float, dict[str, str], Parts]] = {
    "everything": ({}, {}, 30, BOTH, (1, 1, 1, 1, 1)),
    "price at the cap": ({}, {}, 40, BOTH, (1, 1, 1, 1, 1)),
    "price above the cap": ({}, {}, 40.01, BOTH, (4 / 5, 1, 1, 1, 0)),
    "one option of two": ({}, {}, 30, {"size": "large"}, (4 / 5, 1, 1, 1 / 2, 1)),
    "no option": ({}, {}, 30, {}, (3 / 5, 1, 1, 0, 1)),
    "wrong option": ({}, {}, 30, {"color": "red", "size": "large"}, (4 / 5, 1, 1, 1 / 2, 1)),
    "options under other names": ({}, {}, 30, {"a": "large", "b": "navy"}, (1, 1, 1, 1, 1)),
    "more options than wanted": ({}, {}, 30, {**BOTH, "fit": "regular"}, (1, 1, 1, 1, 1)),
    "goal options as a list": ({}, {"goal_options": ["navy", "large"]}, 30, BOTH, (1, 1, 1, 1, 1)),
    "no option wanted": ({}, {"goal_options": {}}, 30, {}, (1, 1, 1, 1, 1)),
    "no option wanted, one chosen": ({}, {"goal_options": []}, 30, {"color": "red"}, (1, 1, 1, 1, 1)),
    "one chosen value serves two wanted": (
        {}, {"goal_options": ["light navy", "dusty navy"]}, 30, {"color": "navy"}, (4 / 5, 1, 1, 1 / 2, 1)
    ),  # "light" comes before "navy" among the colours: "light navy" is light
    "colour by its plain name": ({}, {"goal_options": ["dusty navy 2"]}, 30, {"color": "01 navy"}, (1, 1, 1, 1, 1)),
    "chosen colour by its plain name": ({}, {"goal_options": ["blue"]}, 30, {"color": "deepblue7"}, (1, 1, 1, 1, 1)),
    "colours that differ": ({}, {"goal_options": ["navy blue"]}, 30, {"color": "navy"}, (3 / 4, 1, 1, 0, 1)),  # blue
    "option in part": ({}, {"goal_options": ["pack of 12"]}, 30, {"size": "12 ounce (pack of 12)"}, (1, 1, 1, 1, 1)),
    "option just alike": ({}, {"goal_options": ["medium"]}, 30, {"size": "mediums"}, (1, 1, 1, 1, 1)),  # 12/13: 92
    "option not alike": ({}, {"goal_options": ["medium"]}, 30, {"size": "media"}, (3 / 4, 1, 1, 0, 1)),  # 8/11: 73
    "attribute among its own, fuzzily": (
        {"Attributes": ["machine-washable", "fit: SLIM"]}, {}, 30, BOTH, (1, 1, 1, 1, 1)
    ),
    "attribute of another ending": (
        {"Attributes": ["essential oil"]}, {"attributes": ["essential oils"]}, 30, BOTH, (1, 1, 1, 1, 1)
    ),  # 26/27: 96
    "one attribute of two": ({"Attributes": ["slim fit"]}, {}, 30, BOTH, (4 / 5, 1, 1 / 2, 1, 1)),
    "no attribute": ({"Attributes": []}, {}, 30, BOTH, (3 / 5, 1, 0, 1, 1)),
    "attribute in the title": ({"Attributes": []}, {"attributes": ["cotton"]}, 30, BOTH, (1, 1, 1, 1, 1)),
    "attribute in a bullet": ({"Attributes": []}, {"attributes": ["button closure"]}, 30, BOTH, (1, 1, 1, 1, 1)),
    "attribute over two bullets": ({"Attributes": []}, {"attributes": ["closure made"]}, 30, BOTH, (1, 1, 1, 1, 1)),
    "attribute in the description": ({"Attributes": []}, {"attributes": ["organic linen"]}, 30, BOTH, (1, 1, 1, 1, 1)),
    "text is lowered, the attribute is not": (
        {"Attributes": []}, {"attributes": ["Organic Linen"]}, 30, BOTH, (3 / 4, 1, 0, 1, 1)
    ),
    "attribute spelled otherwise in the text": (
        {"Attributes": []}, {"attributes": ["organic linens"]}, 30, BOTH, (3 / 4, 1, 0, 1, 1)
    ),
    "no attribute wanted": ({}, {"attributes": []}, 30, BOTH, (1, 1, 1, 1, 1)),
    "other query, same categories": ({"query": "tops"}, {}, 30, BOTH, (1, 1, 1, 1, 1)),
    "title decides alone": (OTHER_KIND, {}, 30, BOTH, (1, 1, 1, 1, 1)),
    "query decides at a low title score": (
        {**OTHER_KIND, "query": "mens shirts", "name": nouns_of(1)}, {"name": nouns_of(10)}, 30, BOTH, (1, 1, 1, 1, 1)
    ),  # 1/10, not below 0.1
    "two categories decide at a low title score": (
        {"query": "mugs", "product_category": "Men › Clothing › Ties", "name": nouns_of(1)},
        {"name": nouns_of(5)}, 30, BOTH, (1, 1, 1, 1, 1),
    ),  # 1/5, not above 0.2
    "one category is not enough": (
        {"query": "mugs", "product_category": "Clothing › Women › Ties", "name": nouns_of(1)},
        {"name": nouns_of(5)}, 30, BOTH, (1 / 2, 1 / 2, 1, 1, 1),
    ),
    "a category twice counts once": (
        {"query": "mugs", "product_category": "Men › Men › Ties", "name": nouns_of(1)},
        {"name": nouns_of(5)}, 30, BOTH, (1 / 2, 1 / 2, 1, 1, 1),
    ),
    "half, and not all met": (
        {**OTHER_KIND, "name": nouns_of(1)}, {"name": nouns_of(6)}, 50, {"size": "large"}, (3 / 10, 1 / 2, 1, 1 / 2, 0)
    ),
    "a tenth though the query agrees": (
        {"name": nouns_of(1)}, {"name": nouns_of(11)}, 30, BOTH, (1 / 10, 1 / 10, 1, 1, 1)
    ),  # 1/11 < 0.1
    "a tenth for another kind": (
        {**OTHER_KIND, "name": nouns_of(1)}, {"name": nouns_of(20)}, 30, BOTH, (1 / 10, 1 / 10, 1, 1, 1)
    ),
    "nothing though the query agrees": ({"name": "Ceramic Mug"}, {}, 30, BOTH, (0, 0, 1, 1, 1)),
    "nothing for another kind": ({**OTHER_KIND, "name": "Ceramic Mug"}, {}, 30, BOTH, (0, 0, 1, 1, 1)),
    "a goal without nouns scores 0.2": (
        {"name": "Ceramic Mug"}, {"name": "2 3.5 very large"}, 30, BOTH, (1, 1, 1, 1, 1)
    ),
    "a goal without nouns, another kind": (
        {**OTHER_KIND, "name": "Ceramic Mug"}, {"name": "2 3.5 very large"}, 30, BOTH, (1 / 2, 1 / 2, 1, 1, 1)
    ),
    "nothing met": ({"Attributes": []}, {}, 50, {}, (0, 1, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reward_is_what_the_formula_says(name: str) -> None:
    product, goal, price, options, expected = CASES[name]
    reward = purchase_reward({**PRODUCT, **product}, {**GOAL, **goal}, price=price, options=options)
    parts = (reward.total, reward.type, reward.attribute, reward.option, reward.price)
    assert parts == pytest.approx(expected, abs=1e-12)
    assert (reward.total == 1) == (expected[0] == 1)  # a full score is exactly 1: success is read off it


def test_title_bullets_and_description_are_needed_only_for_what_the_attributes_lack() -> None:
    product = {key: PRODUCT[key] for key in ("query", "product_category", "name", "Attributes")}
    assert purchase_reward(product, GOAL, price=30, options=BOTH).total == 1
    with pytest.raises(KeyError, match="Title"):
        purchase_reward(product, {**GOAL, "attributes": ["velvet"]}, price=30, options=BOTH)


JBL = "Saireed UL Listed 2 Prong Power Cord for JBL Bar 3.1 Bar 2.1 Channel 4K Ultra HD Soundbar"
OTHER_CORD = (
    "BRST AC Power Cord Outlet Socket Cable Plug Lead for Panasonic SC-HT830V DVD/VCR Combo Home Theater System"
)


@pytest.mark.parametrize(
    ("bought", "wanted", "score"),
    [
        (
            "adidas Unisex-Adult D.o.n. Issue 2 Indoor Court Shoe",
            "adidas Unisex-Adult D.o.n. Issue 2 Basketball Shoe",
            6 / 7,
        ),
        (OTHER_CORD, JBL + " Home Theater System Subwoofer", 5 / 16),
        (OTHER_CORD, JBL, 2 / 12),
        ("Minkissy 2pcs Stainless Steel Eyebrow Tweezers", "Rusticware 921ORB Kitchen and Bath Cabinet Knob", 0),
        ("Name 1", "Name 1", 1),
    ],
)
def test_title_scores_of_real_titles_are_those_of_the_tagger(bought: str, wanted: str, score: float) -> None:
    """The figures are the ones that a statistical tagger gives for these titles (published as 0.85, 0.31, 0.17, 0)."""
    assert title_score(bought, wanted) == pytest.approx(score)


def test_a_noun_that_the_goal_says_twice_counts_twice() -> None:
    assert nouns("Bar 3.1 Bar 2.1 Cord") == ("bar", "bar", "cord")
    assert title_score("Snack Bar", "Bar 3.1 Bar 2.1 Cord") == pytest.approx(1 / 3)  # distinct shared / all wanted


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Women's Washable Long Dress, Lined", ("women", "dress")),
        ("Sofa-Bed w/ Storage (Blue)", ("sofa", "bed", "w", "storage", "blue")),
        ("Speed Seed Red Shelf Finish", ("speed", "seed", "red", "shelf", "finish")),
        ("Really Delicious Useless Reddish 12oz", ()),
        ("Ünïcode Tëa ☕ 茶", ("ünïcode", "tëa", "茶")),
        ("", ()),
    ],
)
def test_nouns_of_a_title(title: str, expected: tuple[str, ...]) -> None:
    assert nouns(title) == expected


def test_the_first_colour_in_the_list_wins() -> None:
    assert normalize_color("navy blue") == "blue"
    assert normalize_color("dark navy") == "dark"
    assert normalize_color("02#wine") == "wine"
    assert normalize_color("x-large") == "x-large"
    assert normalize_color("multicolored") == "multicolor"  # and not "red", which comes later


def test_phrases_are_alike_above_a_rounded_85() -> None:
    assert alike("tea tree", "tree, TEA!")
    assert alike("oil for men", "oil")
    assert not alike("", "")
    assert alike("abcdefg", "abcdefx")  # 12 of 14 letters: 85.7, which rounds to 86
    assert not alike(29 * "a" + 5 * "b", 29 * "a" + 5 * "c")  # 58 of 68 letters: 85.3, which rounds to 85
    assert alike("café crème brûlée torte", "caf crme brle torte")  # letters of Latin-1 beyond ASCII are dropped


def test_type_reward_at_its_thresholds() -> None:
    cases = {
        (True, 0.0): 0.0, (False, 0.0): 0.0, (True, 0.0999): 0.1, (False, 0.0999): 0.1, (True, 0.1): 1.0,
        (False, 0.1): 0.5, (False, 0.2): 0.5, (False, 0.2001): 1.0, (True, 0.2): 1.0,
    }  # fmt: skip
    assert {arguments: type_reward(*arguments) for arguments in cases} == cases

from __future__ import annotations

import random
import time

import pytest

from spear_lightning.environments.webshop import pages
from spear_lightning.environments.webshop.catalogue import Catalogue
from spear_lightning.environments.webshop.records import Product
from spear_lightning.environments.webshop.session import Session, parse_action

PRODUCT = Product(
    asin="B000000001",
    title="Acme Slim Shirt",
    category="fashion",
    query="shirt",
    product_category="Clothing › Men",
    prices=[12.99, 24.5],
    description="A shirt.",
    bullets=["one", "two"],
    options={"color": ["red", "navy"], "size": ["small", "features"]},
    attributes=["slim fit"],
    reviews=[["good", "5.0", "would buy again"]],
    rating="5.0",
)
BARE = Product("B000000002", "Bare", "fashion", "x", "x", [100.0], "", [], {}, [], [])


FIRST = "the first hit"


@pytest.fixture
def session(catalogue: Catalogue) -> Session:
    return Session(catalogue, catalogue.goal("synthetic", 0))


def go(session: Session, *actions: str) -> Session:
    for action in actions:
        chosen = action.replace(FIRST, f"click[{next(filter(is_asin, session.page.clicks), '')}]")
        assert session.act(chosen), chosen
    return session


def is_asin(label: str) -> bool:
    return len(label) == 10 and label.startswith("b")


# -- pages ------------------------------------------------------------------------------------------------------


def test_the_search_page() -> None:
    page = pages.search_page()
    assert (page.text, page.admissible) == ("WebShop [SEP] Search", ["search[<your query>]"])


@pytest.mark.parametrize(
    ("number", "total", "buttons"),
    [
        (1, 5, ["back to search"]),
        (1, 10, ["back to search"]),
        (1, 11, ["back to search", "next >"]),
        (3, 50, ["back to search", "< prev", "next >"]),
        (5, 50, ["back to search", "< prev"]),
        (1, 0, ["back to search"]),
    ],
)
def test_a_page_of_results(number: int, total: int, buttons: list[str]) -> None:
    cards = [("B000000001", "$1.0", "One"), ("B000000002", "$2.0 to $3.0", "Two")] if total else []
    page = pages.results_page(cards, number, total)
    assert page.admissible == [f"click[{name}]" for name in [*buttons, *(asin.lower() for asin, *_ in cards)]]
    shown = {"back to search": "Back to Search", "< prev": "< Prev", "next >": "Next >"}
    head = ["Back to Search", f"Page {number} (Total results: {total})", *(shown[name] for name in buttons[1:])]
    rows = ["B000000001", "One", "$1.0", "B000000002", "Two", "$2.0 to $3.0"] if total else []
    assert page.text == " [SEP] ".join([*head, *rows])


def test_the_page_of_an_item() -> None:
    page = pages.item_page(PRODUCT, {"color": "navy"})
    assert page.text == (
        "You have clicked navy. [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] navy [SEP] size [SEP] "
        "small [SEP] features [SEP] Acme Slim Shirt [SEP] Price: $12.99 to $24.5 [SEP] Rating: 5.0 [SEP] Description "
        "[SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    names = ("back to search", "< prev", "red", "navy", "small", "features", "description", "reviews", "buy now")
    assert page.admissible == [f"click[{name}]" for name in names]


@pytest.mark.parametrize(
    ("name", "product", "content"),
    [
        ("Description", PRODUCT, "A shirt."),
        ("Description", BARE, "No Description"),
        ("Features", PRODUCT, "one [SEP] two"),
        ("Features", BARE, "No Features"),
        ("Reviews", PRODUCT, '"good" [SEP] 5.0 [SEP] would buy again'),
        ("Reviews", BARE, "No reviews found"),
    ],
)
def test_the_pages_behind_an_item(name: str, product: Product, content: str) -> None:
    page = pages.sub_page(product, name)
    assert page.text == f"Back to Search [SEP] < Prev [SEP] {content}"
    assert page.admissible == ["click[back to search]", "click[< prev]"]


def test_the_last_page_offers_nothing() -> None:
    page = pages.done_page(0.75)
    assert (page.text.split(" [SEP] ")[-1], page.admissible) == ("0.75", [])


# -- ways through them ------------------------------------------------------------------------------------------


def test_pages_of_results_lead_forth_and_back(session: Session) -> None:
    go(session, "search[slim shirt color]")
    seen = [session.page.clicks[-10:]]
    for number in range(2, 6):
        go(session, "click[next >]")
        assert f"Page {number} (Total results: 50)" in session.page.text
        seen.append(session.page.clicks[-10:])
    assert len({asin for page in seen for asin in page}) == 50
    assert not session.act("click[next >]")
    for number in range(4, 0, -1):
        go(session, "click[< prev]")
        assert session.page.clicks[-10:] == seen[number - 1]
    assert not session.act("click[< prev]")
    assert go(session, "click[back to search]").page == pages.search_page()


def test_an_item_leads_back_to_its_page_of_results(session: Session) -> None:
    go(session, "search[slim shirt color]", "click[next >]")
    results = session.page
    go(session, FIRST, "click[< prev]")
    assert session.page == results
    go(session, FIRST, "click[back to search]")
    assert session.page == pages.search_page()


@pytest.mark.parametrize("name", ["description", "features", "reviews"])
def test_pages_behind_an_item_keep_its_options(session: Session, name: str) -> None:
    go(session, "search[slim shirt color]", FIRST)
    option = session.page.clicks[2]
    item = go(session, f"click[{option}]").page
    assert item.text.startswith(f"You have clicked {option}.")
    go(session, f"click[{name}]")
    assert session.page != item
    assert go(session, "click[< prev]").page == item
    go(session, "click[< prev]", FIRST)
    assert "You have clicked" not in session.page.text  # another visit starts afresh


def test_options_of_one_name_replace_each_other_and_buttons_go_first(
    catalogue: Catalogue, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(session, "search[slim shirt color]", FIRST)
    monkeypatch.setattr(Session, "_shown", PRODUCT)
    go(session, "click[description]", "click[< prev]", "click[red]", "click[small]", "click[navy]")
    assert session._chosen == {"color": "navy", "size": "small"}
    go(session, "click[features]")
    assert session.page.text.endswith("one [SEP] two")


def test_a_value_that_two_options_have_belongs_to_the_last(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    go(session, "search[slim shirt color]", FIRST)
    both = {field: getattr(PRODUCT, field) for field in PRODUCT.__slots__} | {"options": {"a": ["x"], "b": ["x"]}}
    monkeypatch.setattr(Session, "_shown", Product(**both))
    go(session, "click[description]", "click[< prev]", "click[x]")
    assert session._chosen == {"b": "x"}


def test_a_search_is_possible_everywhere_and_drops_the_options(session: Session) -> None:
    go(session, "search[slim shirt color]", FIRST)
    go(session, f"click[{session.page.clicks[2]}]", "search[coffee]")
    assert "Page 1 (Total results: " in session.page.text
    assert "coffee" in session.page.text.lower()
    assert session._chosen == {}


def test_after_a_purchase_nothing_more_can_be_done(session: Session) -> None:
    go(session, "search[slim shirt color]", FIRST, "click[buy now]")
    assert session.purchase is not None
    assert session.page == pages.done_page(session.purchase.total)
    for action in ("search[shirt]", "click[back to search]", "click[buy now]"):
        assert not session.act(action)


def test_every_admissible_action_is_carried_out(catalogue: Catalogue) -> None:
    rng = random.Random(0)
    places = set()
    for number in range(60):
        goal = catalogue.goal("synthetic", number)
        session = Session(catalogue, goal)
        for _ in range(15):
            admissible = session.page.admissible
            if not admissible:
                break
            action = rng.choice(admissible).replace("<your query>", goal.product.query)
            assert session.act(action), action
            places.add((session._place, bool(session._chosen)))
    assert places >= {(place, False) for place in ("search", "results", "item", "sub", "done")}
    assert ("item", True) in places


# -- actions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("search[red shirt]", ("search", "red shirt")),
        ("  Search [ Red\n SHIRT ] ", ("search", "red shirt")),
        ("click[< Prev]", ("click", "< prev")),
        ("search[a [b] c]", ("search", "a [b] c")),
        ("search[[[[]]]]", ("search", "[[[]]]")),
        ("search[]", None),
        ("search[ ]", None),
        ("search", None),
        ("search[red", None),
        ("buy[shirt]", None),
        ("search[a] click[b]", ("search", "a] click[b")),
        ("think[click[buy now]]", None),
        ("", None),
        (None, None),
        (b"click[x]", None),
        (["click[x]"], None),
        ("search[" + "x" * 5000 + "]", None),
    ],
)
def test_what_an_action_says(text: object, parsed: tuple[str, str] | None) -> None:
    assert parse_action(text) == parsed


HOSTILE = [
    "x" * 10_000_000,
    "search[" * 1_400_000,
    "search[" + "[" * 5_000_000 + "]" * 5_000_000 + "]",
    "[" * 4000,
    "search[" + "[" * 4000 + "]",
    "search[" + "a " * 2000 + "]",
    "search[\udcff\ud800 \0 \u202e \ufeff ﷽]",
    "click[\udcff]",
    "search['; DROP TABLE products; --]",
    "search[<r>]",
    "click[search]",
    "click[B000000000]",
    "click[next >] ",
    "click[buy now",
    "click[../../etc/passwd]",
    "search[" + "ﬁ" * 2000 + "]",
    "click[" + " " * 4000 + "buy now]",
    "İ[İ]",
]


@pytest.mark.parametrize("action", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("place", ["search", "results", "item", "sub"])
def test_no_action_is_fatal_or_slow(session: Session, place: str, action: str) -> None:
    if place != "search":
        go(session, "search[slim shirt color]", *(["click[next >]"] * 4))
    if place in ("item", "sub"):
        go(session, FIRST)
    if place == "sub":
        go(session, "click[description]")
    before = session.page
    started = time.process_time()
    done = session.act(action)
    assert time.process_time() - started < 0.5
    assert done or session.page == before
    assert session.purchase is None or "buy now" in action

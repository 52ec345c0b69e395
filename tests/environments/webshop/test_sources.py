from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spear_lightning.environments.webshop.catalogue import Catalogue, build_catalogue
from spear_lightning.environments.webshop.generator import GeneratedProducts, write_official_layout
from spear_lightning.environments.webshop.prices import (
    NO_CAP,
    draw_price,
    draw_price_cap,
    price_clause,
    read_prices,
)
from spear_lightning.environments.webshop.records import RecordError, read_product
from spear_lightning.environments.webshop.session import Session
from spear_lightning.environments.webshop.sources import OfficialFiles

RECORD: dict[str, Any] = {
    "asin": "B000000001",
    "name": "A  Shirt\n of Linen",
    "category": "fashion",
    "query": " Mens Shirts ",
    "product_category": "Clothing › Men",
    "pricing": "$12.99",
    "full_description": None,
    "small_description": ["one", "two"],
    "images": ["x"],
    "customization_options": {"Color": [{"value": " Navy/Blue "}, {"value": "RED"}], "Size": None, "fit": []},
}


def test_a_record_becomes_a_product() -> None:
    reviews = {"average_rating": 4.5, "reviews": [{"title": "t", "stars": "5.0", "review": "r"}, {"title": "u"}]}
    product = read_product(RECORD, ["slim fit"], reviews)
    assert product is not None
    assert (product.asin, product.title, product.query) == ("B000000001", "A Shirt of Linen", "mens shirts")
    assert product.options == {
        "color": ["navy | blue", "red"]
    }  # as in the original: lower case, no slash, no empty one
    assert (product.description, product.bullets, product.attributes) == ("", ["one", "two"], ["slim fit"])
    assert (product.rating, product.reviews) == ("4.5", [["t", "5.0", "r"], ["u", "", ""]])
    assert product.search_text == "A Shirt of Linen  one color: navy | blue, red"


def test_what_may_be_missing_has_the_originals_default() -> None:
    product = read_product({key: RECORD[key] for key in ("asin", "name", "category", "query", "product_category")})
    assert product is not None
    assert (product.prices, product.price_tag, product.rating) == ([100.0], "$100.0", "N.A.")
    assert (product.options, product.bullets, product.attributes) == ({}, [], ["DUMMY_ATTR"])
    assert read_product({**RECORD, "small_description": "only one"}).bullets == ["only one"]  # type: ignore[union-attr]


@pytest.mark.parametrize("asin", ["B0000000012", "nan", "", "   "])
def test_a_record_without_a_usable_asin_is_passed_over(asin: str) -> None:
    assert read_product({**RECORD, "asin": asin}) is None
    assert read_product({**RECORD, "asin": "B00000001"}) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "'name' is missing"),
        ({"query": 3}, "'query' is a int, not text"),
        ({"asin": None}, "'asin' is missing"),
        ({"customization_options": ["red"]}, "'customization_options' is a list"),
        ({"customization_options": {"color": ["red"]}}, "option 'color'"),
        ({"customization_options": {"color": 3}}, "option 'color'"),
    ],
)
def test_a_record_that_lacks_something_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_product({**RECORD, **change})


@pytest.mark.parametrize(
    ("pricing", "prices"),
    [
        ("$12.99", [12.99]),
        ("$12.99$24.5", [12.99, 24.5]),
        ("$12.99 to $24.5", [12.99, 24.5]),
        ("$1,299.00", [1299.0]),
        ("$1$2$3", [1, 2]),
        (None, [100]),
        ("", [100]),
        ("ask us", [100]),
        ("$", [100]),
        ("12.99", [100]),  # no dollar sign, no price: as in the original
        ([], [100]),
    ],
)
def test_prices(pricing: object, prices: list[float]) -> None:
    assert read_prices(pricing) == prices


def test_price_tags_draws_and_clauses() -> None:
    products = [read_product({**RECORD, "pricing": pricing}) for pricing in ("$12.99", "$12.99$24.50")]
    assert [product.price_tag for product in products if product] == ["$12.99", "$12.99 to $24.5"]
    assert draw_price([12.99], seed=1) == 12.99
    draws = {draw_price([10, 20], seed) for seed in range(50)}
    assert len(draws) == 50
    assert min(draws) >= 10
    assert max(draws) <= 20
    assert price_clause(40) == ", and price lower than 40.00 dollars"
    assert price_clause(NO_CAP) == ""


def test_a_cap_is_the_larger_of_two_of_the_next_four_multiples_of_ten() -> None:
    assert {draw_price_cap(12.99, seed) for seed in range(200)} == {30, 40, 50}
    assert {draw_price_cap(20, seed) for seed in range(200)} == {40, 50, 60}  # 20 itself is not above 20
    assert {draw_price_cap(970, seed) for seed in range(50)} == {990}  # 980 and 990 are left
    assert draw_price_cap(980, 0) == NO_CAP
    assert draw_price_cap(12.99, 7) == draw_price_cap(12.99, 7)


# -- the official files -----------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The official layout with forty generated products."""
    write_official_layout(tmp_path / "data", 40, seed=5)
    return tmp_path / "data"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def build(folder: Path, tmp_path: Path, products: int | None = None) -> Catalogue:
    return Catalogue(build_catalogue(tmp_path / "cache", OfficialFiles(folder, products)))


def test_official_files_hold_what_was_generated(official: Path, tmp_path: Path) -> None:
    read = build(official, tmp_path)
    made = Catalogue(build_catalogue(tmp_path / "cache", GeneratedProducts(40, seed=5)))
    assert list(read) == list(made)
    for kind in ("human", "synthetic"):
        assert read.goals(kind) == made.goals(kind) > 40
        assert all(read.goal(kind, number) == made.goal(kind, number) for number in range(read.goals(kind)))
    assert not list((tmp_path / "cache").rglob("scratch"))


def test_odd_letters_in_names_and_options_can_be_clicked(official: Path, tmp_path: Path) -> None:
    def change(records: list[dict[str, Any]]) -> None:
        values = ["İ ß", "a]b[c", "\ud800", "  two  words ", "click[x]"]
        records[0]["asin"], records[0]["name"] = "İß00000000", "Zebra \ud800 [SEP] <b>"
        records[0]["customization_options"] = {"Größe": [{"value": value} for value in values]}

    edit(official / "items_shuffle.json", change)
    shop = build(official, tmp_path)
    session = Session(shop, shop.goal("human", 0))
    assert session.act("search[zebra]")
    assert session.act(session.page.admissible[-1])
    for action in session.page.admissible[2:7]:
        assert session.act(action), action
    assert session.act("click[buy now]")


def test_long_asins_and_repeated_ones_are_dropped(official: Path, tmp_path: Path) -> None:
    def change(records: list[dict[str, Any]]) -> None:
        records[3]["asin"] += "X"
        records[5]["asin"] = records[4]["asin"]

    edit(official / "items_shuffle.json", change)
    shop = build(official, tmp_path)
    assert len(shop) == 38
    assert shop.left_out["products with instructions that are not in the catalogue"] == 2


def test_only_the_first_products_are_read_where_so_many_are_asked_for(official: Path, tmp_path: Path) -> None:
    path = official / "items_shuffle.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps(records[:7])[:-1] + ", broken")  # what follows is not looked at
    assert [product.asin for product in build(official, tmp_path, 7)] == [record["asin"] for record in records[:7]]
    with pytest.raises(ValueError, match=r"items_shuffle\.json is not valid JSON, or cut off, after 7 entries"):
        build(official, tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # one catalogue and two locks: nothing half made


def test_instructions_that_cannot_become_goals_are_counted(official: Path, tmp_path: Path) -> None:
    before = build(official, tmp_path)

    def gone(human: dict[str, Any]) -> None:
        human["B0ELSEWHERE"] = next(iter(human.values()))
        next(iter(human.values()))[0]["instruction_attributes"] = []

    edit(official / "items_human_ins.json", gone)

    def bare(notes: dict[str, Any]) -> None:
        first, second, third, *_ = notes
        notes[first]["instruction_attributes"] = []
        notes[second]["instruction"] = None
        del notes[third]

    edit(official / "items_ins_v2.json", bare)
    after = build(official, tmp_path)
    assert after.left_out == {
        "instructions without attributes": 2,
        "products with instructions that are not in the catalogue": 1,
    }
    assert after.goals("human") == before.goals("human") - 1
    assert after.goals("synthetic") < before.goals("synthetic")
    assert list(after)[2].attributes == ["DUMMY_ATTR"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "items_shuffle.json",
            lambda records: records[2].pop("query"),
            r"record 3 \(asin \w{10}\): 'query' is missing",
        ),
        ("items_shuffle.json", lambda records: records.insert(1, 5), "record 2 is a JSON int"),
        (
            "items_human_ins.json",
            lambda human: next(iter(human.values()))[0].pop("instruction"),
            r"record 1 \(asin \w{10}\): its instruction",
        ),
        (
            "items_ins_v2.json",
            lambda notes: next(iter(notes.values())).update(instruction_attributes="slim"),
            "attributes or options are no list",
        ),
    ],
)
def test_a_broken_entry_is_named(
    official: Path, tmp_path: Path, file: str, change: Callable[[Any], Any], message: str
) -> None:
    edit(official / file, lambda content: (change(content), None)[1])
    with pytest.raises(ValueError, match=message) as caught:
        build(official, tmp_path)
    assert "items_shuffle.json" in str(caught.value)


@pytest.mark.parametrize("file", ["items_shuffle.json", "items_ins_v2.json"])
def test_a_missing_file_is_one_clear_error(official: Path, tmp_path: Path, file: str) -> None:
    (official / file).unlink()
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as caught:
        build(official, tmp_path)
    assert str(official) in str(caught.value)
    assert "data_dir" in str(caught.value)


def test_the_small_files_of_the_original_are_found_too(official: Path, tmp_path: Path) -> None:
    for name in ("items_shuffle", "items_ins_v2"):
        (official / f"{name}.json").rename(official / f"{name}_1000.json")
    (official / "reviews.json").unlink()
    shop = build(official, tmp_path, 1000)
    assert len(shop) == 40
    assert {product.rating for product in shop} == {"N.A."}


def test_a_catalogue_without_products_is_an_error(official: Path, tmp_path: Path) -> None:
    (official / "items_shuffle.json").write_text("[]")
    with pytest.raises(ValueError, match="no product"):
        build(official, tmp_path)


def test_changed_files_make_another_catalogue(official: Path, tmp_path: Path) -> None:
    key = OfficialFiles(official).key
    assert OfficialFiles(official, 10).key != key
    edit(official / "items_shuffle.json", lambda records: records[:-1])
    assert OfficialFiles(official).key != key

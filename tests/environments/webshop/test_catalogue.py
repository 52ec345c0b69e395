from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest

from spear_lightning.environments.webshop.catalogue import Catalogue, build_catalogue
from spear_lightning.environments.webshop.generator import GeneratedProducts
from spear_lightning.environments.webshop.goals import (
    MOST_VARIANTS,
    Instruction,
    combination,
    human_goal,
    published_order,
    synthetic_goal,
    variants,
)
from spear_lightning.environments.webshop.kinds import KINDS
from spear_lightning.environments.webshop.reward import purchase_reward
from spear_lightning.environments.webshop.sources import Entry


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_seeds_give_equal_files_and_other_seeds_others(tmp_path: Path) -> None:
    first, second = (build_catalogue(tmp_path / name, GeneratedProducts(34, seed=3)) for name in ("a", "b"))
    assert first.name == second.name
    assert files(first) == files(second)
    other = build_catalogue(tmp_path / "a", GeneratedProducts(34, seed=4))
    assert other.name != first.name
    assert files(other)["records.bin"] != files(first)["records.bin"]


class Logged(GeneratedProducts):
    """Notes in a file beside the cache that it is read."""

    def entries(self, scratch: Path) -> Iterator[Entry]:
        with (scratch.parents[2] / "log").open("a") as log:
            log.write("read\n")
        return super().entries(scratch)


def _build(root: Path) -> None:
    build_catalogue(root, Logged(300, seed=1))


def test_processes_that_build_at_once_build_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_build, args=(tmp_path / "cache",)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert (tmp_path / "log").read_text() == "read\n"
    assert files(folder) == files(build_catalogue(tmp_path / "alone", GeneratedProducts(300, seed=1)))


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = GeneratedProducts(34)

    def interrupted(self: GeneratedProducts, scratch: Path):  # type: ignore[no-untyped-def]
        yield next(entries(self, scratch))
        raise KeyboardInterrupt

    entries = GeneratedProducts.entries
    monkeypatch.setattr(GeneratedProducts, "entries", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_catalogue(tmp_path, source)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.setattr(GeneratedProducts, "entries", entries)
    assert len(Catalogue(build_catalogue(tmp_path, source))) == 34


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache_dir") as caught:
        build_catalogue(tmp_path / "file", GeneratedProducts(1))
    assert str(tmp_path / "file") in str(caught.value)


def test_a_thousand_products_of_all_kinds(catalogue: Catalogue) -> None:
    products = list(catalogue)
    assert len(catalogue) == len({product.asin for product in products}) == 1000
    assert {product.query for product in products} == {kind.noun for kind in KINDS}
    assert {product.category for product in products} == {"beauty", "electronics", "fashion", "garden", "grocery"}
    for product in products:
        assert len(product.asin) == 10
        text = " ".join([product.title, product.description, *product.bullets]).lower()
        assert all(phrase in text for phrase in product.attributes)  # all that is asked for can be read
        assert all(len(values) >= 2 for values in product.options.values())
    assert any(len(product.prices) == 2 for product in products)
    assert any(product.price_tag == "$100.0" for product in products)
    for number in range(0, 1000, 97):
        product = products[number]
        assert catalogue.card(number) == (product.asin, product.price_tag, product.title)
        assert min(product.prices) <= catalogue.price(number) <= max(product.prices)


@pytest.mark.parametrize("kind", ["human", "synthetic"])
def test_the_product_that_a_goal_is_about_is_worth_1(catalogue: Catalogue, kind: str) -> None:
    numbers = {product.asin: number for number, product in enumerate(catalogue)}
    for number in range(0, catalogue.goals(kind), 37):  # type: ignore[arg-type]
        goal = catalogue.goal(kind, number)  # type: ignore[arg-type]
        chosen = dict(goal.options) if isinstance(goal.options, dict) else {v: v for v in goal.options}
        price = catalogue.price(numbers[goal.product.asin])
        assert 10 <= goal.price_cap - price <= 40 or goal.price_cap == 1_000_000
        reward = purchase_reward(goal.product.reward_view(), goal.reward_view(), price=price, options=chosen)
        assert reward.total == 1
        assert goal.instruction.endswith(f", and price lower than {goal.price_cap:.2f} dollars")
        assert all(phrase in goal.instruction for phrase in goal.attributes)
        values = goal.options.values() if isinstance(goal.options, dict) else goal.options
        assert all(value in goal.instruction for value in values)


def test_goals_are_all_instructions_in_the_published_order(catalogue: Catalogue) -> None:
    combinations = [prod(len(values) for values in product.options.values()) for product in catalogue]
    assert catalogue.goals("synthetic") == sum(combinations)
    assert catalogue.goals("human") == 3000
    order = published_order(3000)
    products = [product.asin for product in catalogue for _ in range(3)]
    assert [catalogue.goal("human", number).product.asin for number in range(50)] == [products[p] for p in order[:50]]


def test_a_products_synthetic_goals_share_a_cap_and_human_ones_do_not(catalogue: Catalogue) -> None:
    caps: dict[tuple[str, str], set[float]] = {}
    for kind in ("human", "synthetic"):
        for number in range(catalogue.goals(kind)):  # type: ignore[arg-type]
            goal = catalogue.goal(kind, number)  # type: ignore[arg-type]
            caps.setdefault((kind, goal.product.asin), set()).add(goal.price_cap)
    assert all(len(found) == 1 for (kind, _), found in caps.items() if kind == "synthetic")
    assert sum(len(found) > 1 for (kind, _), found in caps.items() if kind == "human") > 500


def test_the_order_is_pythons_shuffle_with_the_originals_seed() -> None:
    expected = list(range(100))
    random.seed(233)
    random.shuffle(expected)
    assert list(published_order(100)) == expected
    assert not published_order(0)


def test_combinations_run_like_nested_loops_over_sorted_names() -> None:
    options = {"size": ["s", "m"], "color": ["red", "blue", "teal"]}
    assert [tuple(combination(options, number).items()) for number in range(6)] == [
        (("color", color), ("size", size)) for color in ("red", "blue", "teal") for size in ("s", "m")
    ]
    assert (variants(options), variants({}), combination({}, 0)) == (6, 1, {})
    assert variants({str(name): ["x"] * 10 for name in range(30)}) == MOST_VARIANTS


def test_instructions_are_worded_as_in_the_original(catalogue: Catalogue) -> None:
    product = next(iter(catalogue))
    told = Instruction("i need a shirt.", ("slim fit",), ("navy",))
    assert human_goal(product, told, 40).instruction == "i need a shirt, and price lower than 40.00 dollars"
    assert human_goal(product, told, 1_000_000).instruction == "i need a shirt"
    names = sorted(product.options)
    first = {name: product.options[name][0] for name in names}
    expected = "find a shirt with " + ", and ".join(f"{name}: {value}" for name, value in first.items())
    assert synthetic_goal(product, Instruction("find a shirt", ("slim fit",)), 0, 1_000_000).instruction == expected
    plain = type(product)(**{field: getattr(product, field) for field in product.__slots__} | {"options": {}})
    goal = synthetic_goal(plain, Instruction("find a shirt", ("slim fit",)), 0, 30)
    assert goal.instruction == "find a shirt, and price lower than 30.00 dollars"

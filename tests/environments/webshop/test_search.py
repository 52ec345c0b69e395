from __future__ import annotations

import random
from pathlib import Path

import bm25s
import numpy as np
import pytest

from spear_lightning.environments.webshop import search
from spear_lightning.environments.webshop.catalogue import Catalogue
from spear_lightning.environments.webshop.search import IndexBuilder, SearchIndex, stems, tokens

WORDS = [
    stem + ending for stem in ("run", "shirt", "blue", "candl", "walk", "tea") for ending in ("s", "ing", "ed", "")
]


def index_of(folder: Path, texts: list[str]) -> SearchIndex:
    builder = IndexBuilder(folder)
    for text in texts:
        builder.add(text)
    builder.finish()
    return SearchIndex(folder)


@pytest.mark.parametrize("chunk", [1 << 22, 50])  # postings in one piece, and merged from many
def test_scores_are_those_of_bm25s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(search, "_CHUNK", chunk)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(200)]
    index = index_of(tmp_path, texts)
    reference = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    reference.index([stems(text) for text in texts], show_progress=False)
    for _ in range(20):
        query = " ".join(rng.choices(WORDS, k=4))
        expected = reference.get_scores(stems(query))
        np.testing.assert_allclose(index.scores(query), expected, rtol=1e-5, atol=1e-6)
        hits = index.search(query, 10)
        assert list(hits) == sorted(np.flatnonzero(expected), key=lambda doc: (-index.scores(query)[doc], doc))[:10]


def test_words_are_found_by_their_stems(tmp_path: Path) -> None:
    index = index_of(tmp_path, ["running shoes", "candles for women's rooms", "a washable shirt", "nothing"])
    assert list(index.search("shoe")) == [0]
    assert list(index.search("RUNS")) == [0]
    assert list(index.search("candle woman rooms candles")) == [1]
    assert list(index.search("washing shirts")) == [2]


def test_equal_scores_are_ordered_by_number_and_the_limit_holds(tmp_path: Path) -> None:
    index = index_of(tmp_path, ["tea"] * 30 + ["tea tea"])
    assert list(index.search("tea", 5)) == [30, 0, 1, 2, 3]
    assert len(index.search("tea", 50)) == 31


@pytest.mark.parametrize("query", ["", "the of and", "zzz", "\udcff\0", "!!!", "茶", "x" * 4000, "$" * 4000])
def test_a_query_without_known_words_finds_nothing(tmp_path: Path, query: str) -> None:
    assert list(index_of(tmp_path, ["tea for two", "coffee"]).search(query)) == []


def test_a_collection_without_words_can_be_searched(tmp_path: Path) -> None:
    assert list(index_of(tmp_path, ["", "the"]).search("tea")) == []


def test_tokens_keep_numbers_and_drop_stop_words_and_possessives() -> None:
    assert tokens("The Women's 3.5 oz. cup, of_tea (x-large)") == ["women", "3.5", "oz", "cup", "tea", "x", "large"]


def test_a_product_is_found_by_title_description_first_bullet_and_options(catalogue: Catalogue) -> None:
    number, product = next((n, p) for n, p in enumerate(catalogue) if len(p.bullets) > 1)
    color = next(iter(product.options.values()))[0]
    assert number in catalogue.search.search(product.title, 10)
    for text in (product.description, product.bullets[0], f"{product.title.split()[0]} {color}"):
        assert catalogue.search.scores(text)[number] > 0
    brand = product.title.split()[0]
    without = catalogue.search.scores(brand)[number]
    assert catalogue.search.scores(f"{brand} {color}")[number] > without

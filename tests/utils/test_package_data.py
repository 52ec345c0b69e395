"""Data files: they are read beside their module, and the wheel has all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_lightning.utils.package_data import read_yaml

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_is_read_beside_the_module_that_asks_for_it() -> None:
    phrases = read_yaml("spear_lightning.environments.alfworld.expert", "phrases.yaml")
    assert "nothing happens" in phrases


def test_the_wheel_has_every_data_file() -> None:
    settings = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    shipped: set[Path] = set()
    for package in settings["packages"]:
        for pattern in (*settings["package-data"]["*"], *settings["package-data"].get(package, ())):
            shipped.update(ROOT.joinpath(*package.split(".")).glob(pattern))
    there = {path for path in (ROOT / "spear_lightning").rglob("*") if path.is_file() and ".py" not in path.suffix}
    assert there - shipped == set()
    assert ROOT / "spear_lightning/environments/webshop/words.yaml" in shipped


@pytest.mark.parametrize("path", sorted((ROOT / "spear_lightning/environments").rglob("*.yaml")), ids=lambda p: p.stem)
def test_words_are_text_and_stand_once_in_a_list(path: Path) -> None:
    def check(value: object) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                assert isinstance(name, str), name
                check(part)
        elif isinstance(value, list):
            assert len({str(part) for part in value}) == len(value)
            for part in value:
                check(part)
        else:
            assert isinstance(value, (str, int, float)), value
            assert not isinstance(value, bool), "quote the word: YAML reads a truth value"

    check(read_yaml(".".join((*path.relative_to(ROOT).parent.parts, "")), path.name))

"""A small generated shop, built once for the whole test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spear_lightning.environments.webshop import WebShop
from spear_lightning.environments.webshop.catalogue import Catalogue
from spear_lightning.environments.webshop.environment import WebShopEnv


@pytest.fixture(scope="session")
def shop_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of built catalogues."""
    return tmp_path_factory.mktemp("webshop-cache")


@pytest.fixture(scope="session")
def shop(shop_cache: Path) -> WebShop:
    """The default shop, with synthetic goals."""
    suite = WebShop(goals="synthetic", cache_dir=str(shop_cache))
    suite.prepare()
    return suite


@pytest.fixture(scope="session")
def catalogue(shop: WebShop) -> Catalogue:
    return shop.loaded


@pytest.fixture
def env(shop: WebShop) -> Iterator[WebShopEnv]:
    environment = shop.make()
    yield environment
    environment.close()

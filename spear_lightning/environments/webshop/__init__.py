"""WebShop: shopping for what an instruction asks, in text, over an official or a generated catalogue."""

from spear_lightning.environments.webshop.suite import WebShop

__all__ = ["WebShop"]

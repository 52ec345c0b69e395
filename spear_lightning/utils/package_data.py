"""Data files of the package: tables and word lists that stand beside the module that uses them."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml


def read_yaml(module: str, name: str) -> Any:
    """What a YAML file of the package holds.

    Args:
        module: ``__name__`` of the module beside which the file lies.
        name: of the file.
    """
    return yaml.safe_load(files(module.rpartition(".")[0]).joinpath(name).read_text(encoding="utf-8"))

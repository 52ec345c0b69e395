"""What ``spear`` makes of configuration files."""

from __future__ import annotations

import contextlib
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from spear_lightning.cli.main import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@functools.cache
def composed(*names: str) -> dict[str, Any]:
    """The configuration of files below configs/, in order, with every default; composed once, so leave it as it is."""
    files = [part for name in names for part in ("-c", str(CONFIGS / f"{name}.yaml"))]
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(printed):
        main(["fit", *files, "--print_config"])
    assert stop.value.code in (0, None)
    config: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return config

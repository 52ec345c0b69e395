"""The command lines of the warm starts: every argument of a function is a YAML key and an option."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from jsonargparse import ArgumentParser
from transformers.utils.logging import disable_progress_bar

Result = TypeVar("Result")


def run_command(
    function: Callable[..., Result], prog: str, description: str, arguments: Sequence[str] | None
) -> Result:
    """Call ``function`` with what the command line and its YAML files say.

    Args:
        function: whose arguments are the options.
        prog: name of the command.
        description: for ``--help``.
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file; may be given several times, later ones win."
    )
    parser.add_function_arguments(function)
    settings = parser.parse_args(None if arguments is None else list(arguments))
    settings.pop("config", None)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    cast(Any, disable_progress_bar)()  # of loading and saving, which take milliseconds here
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # newer versions call it `instantiate`, older know only this
        objects = parser.instantiate_classes(settings)
    return function(**objects.as_dict())

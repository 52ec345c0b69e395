"""The command line: ``spear fit | validate | test | predict | plan | reshard | export | sft``.

``fit`` to ``predict`` are a LightningCLI: every argument of trainer, module and data module is a YAML key, and overlays
are given one after the other (``-c a.yaml -c b.yaml``; later ones win).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from spear_lightning.cli.fit import SpearCLI, make_cli
from spear_lightning.distributed.failures import lost_rank

COMMANDS = {
    "plan": "spear_lightning.cli.plan",
    "reshard": "spear_lightning.cli.reshard",
    "export": "spear_lightning.cli.export",
    "sft": "spear_lightning.sft.run",
    "warmstart": "spear_lightning.sft.run",
}
"""Modules whose ``main`` is a command of its own, imported when it is called; ``warmstart`` is sft's older name."""


class _Started(Callback):
    """Knows whether the first loop has begun: what fails before that is the user's to mend, not ours."""

    def __init__(self) -> None:
        self.started = False

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _start


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``spear``.

    Errors in what the user gave (an unknown key, a missing folder, a checkpoint of another model) end with one message
    and exit status 2; set ``SPEAR_TRACEBACK=1`` to see where they were raised. Anything that fails once training or
    evaluation has begun keeps its traceback; where that is torch's about a connection, a last line says what it means.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    if arguments is not None:
        sys.argv = ["spear", *arguments]  # what Lightning and its launchers read
    given = sys.argv[1:]
    started = _Started()
    try:
        if given and given[0] in COMMANDS:
            status = importlib.import_module(COMMANDS[given[0]]).main(given[1:])
            if status:
                sys.exit(status)
        else:
            make_cli(SpearCLI, trainer_defaults={"callbacks": started})
    except (MisconfigurationException, ValueError, OSError) as error:
        if started.started or os.environ.get("SPEAR_TRACEBACK") == "1":
            raise
        print(f"spear: error: {_what_was_said(str(error))}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        lost = lost_rank(error)
        if lost is None:
            raise
        raise lost from error


def _what_was_said(message: str) -> str:
    """What a class has said of its argument, without what jsonargparse says around it where that is optional."""
    said = [line.strip()[2:] for line in message.splitlines() if line.startswith("  - ")]
    said = [line for line in said if line != "Expected a <class 'NoneType'>"]
    return said[0] if "Union subtypes" in message and len(said) == 1 else message


if __name__ == "__main__":
    main()

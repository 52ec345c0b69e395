"""``spear fit | validate | test | predict``: a LightningCLI over module and data module.

Every argument of trainer, module and data module is a YAML key, and overlays are given one after the other (``-c a.yaml
-c b.yaml``; later ones win).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import spear_lightning.agents.chat
import spear_lightning.agents.stepwise
import spear_lightning.agents.tool_calling
import spear_lightning.agents.transcript
import spear_lightning.algorithm
import spear_lightning.callbacks
import spear_lightning.engines.api
import spear_lightning.engines.huggingface.engine
import spear_lightning.engines.vllm.engine
import spear_lightning.engines.vllm.server
import spear_lightning.environments.alfworld
import spear_lightning.environments.custom
import spear_lightning.environments.math
import spear_lightning.environments.mixture
import spear_lightning.environments.textworld
import spear_lightning.environments.webshop  # noqa: F401 - imported classes can be named in YAML without their module
from spear_lightning.callbacks.checkpoint import resolve_checkpoint
from spear_lightning.callbacks.evaluation import EvaluationReport
from spear_lightning.distributed.zero import check_strategy
from spear_lightning.metrics.csv_logger import MetricsCSV
from spear_lightning.training.datamodule import RolloutDataModule
from spear_lightning.training.module import SpearModule
from spear_lightning.utils.atomic import write_atomically

USAGE = "[-c CONFIG.yaml ...] [--key value ...]"


class SpearCLI(LightningCLI):
    """LightningCLI with a run directory, one seed for everything, and TensorBoard and ``metrics.csv`` by default."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``run.directory``; the seed of the run is the seed of the data module."""
        parser.add_argument(
            "--run.directory", type=str, default="runs/default", help="Folder that everything the run writes goes to."
        )
        parser.link_arguments("run.directory", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer; it logs straight into the run directory unless loggers are configured."""
        if self._fields.get("trainer.logger") in (None, True):
            directory = self._fields["run.directory"]
            kwargs["logger"] = [TensorBoardLogger(directory, name="", version=""), MetricsCSV(directory)]
        trainer = super().instantiate_trainer(**kwargs)
        check_strategy(trainer.strategy)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, EvaluationReport) for callback in callbacks):
            callbacks.append(EvaluationReport())
        return trainer

    def instantiate_classes(self) -> None:
        """Make trainer, module and data module.

        Raises:
            ValueError: a number is out of range; names its key in the configuration.
        """
        with keys_named(self._fields):
            super().instantiate_classes()

    def before_fit(self) -> None:
        """A run that goes on is not finished."""
        self._finished.unlink(missing_ok=True)

    def after_fit(self) -> None:
        """Leave a file ``finished`` in the run directory, by which a job that is started until then knows.

        Training that SIGTERM has ended before its last iteration leaves none.
        """
        interrupted = any(getattr(callback, "interrupted", False) for callback in self.trainer.checkpoint_callbacks)
        if self.trainer.is_global_zero and not interrupted:
            write_atomically(self._finished, f"{self.trainer.current_epoch} iterations\n")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's own; once one is asked for, that alone, because filling a parser takes part of a second."""
        known: dict[str, set[str]] = LightningCLI.subcommands()
        asked = {name: known[name] for name in sys.argv[1:2] if name in known}
        return asked or known

    @property
    def _fields(self) -> Namespace:
        fields: Namespace = self.config[self.subcommand] if self.subcommand else self.config
        return fields

    @property
    def _finished(self) -> Path:
        return Path(self.trainer.default_root_dir) / "finished"

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") is not None:
            kwargs["ckpt_path"] = resolve_checkpoint(kwargs["ckpt_path"], self.trainer, self.model)
        return kwargs


@contextmanager
def keys_named(config: Namespace) -> Iterator[None]:
    """Within it, a number that a class refuses as out of range is called by its key in the configuration."""
    try:
        yield
    except ValueError as error:
        found = re.search(r"\b[A-Z]\w+\.(\w+) must be (.+), not (\S+)$", str(error), re.MULTILINE)
        if found is None:
            raise
        argument, rule, value = found.groups()
        same = (value, value.removesuffix(".0"))
        keys = [key for key, given in config.items() if key.endswith(f".{argument}") and str(given) in same]
        if not keys:
            raise
        names = " or ".join(key.replace(".init_args.", ".") for key in keys)
        raise ValueError(f"{names} must be {rule}, not {value}") from error


def make_cli(kind: type[SpearCLI], command: str | None = None, **settings: Any) -> SpearCLI:
    """A command line over module and data module; making it runs it.

    Args:
        kind: its class.
        command: how it is called, for messages; ``None`` is by its subcommand's own name.
        settings: of the LightningCLI.
    """
    usages = {name: {"usage": f"spear {command or name} {USAGE}"} for name in kind.subcommands()}
    return kind(
        SpearModule,
        RolloutDataModule,
        seed_everything_default=1,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs=usages,
        **settings,
    )


def _seed(seed: int | bool | None) -> int:
    # `seed_everything: true` draws a seed and leaves it in the environment, where Lightning's workers find it
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if isinstance(seed, bool) or seed is None else seed

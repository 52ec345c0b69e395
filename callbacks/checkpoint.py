"""Checkpoints that are complete or absent, sharded where the strategy shards, with everything that resume needs."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import nullcontext, suppress
from importlib.metadata import distributions
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from uuid import uuid4

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from spear_lightning.callbacks.logs import make_folder
from spear_lightning.checkpoint.manifest import (
    MANIFEST,
    RANKS,
    STATE,
    Manifest,
    StoredFile,
    complete_checkpoints,
    describe_files,
    discard,
    file_names,
    load_complete,
    newest_checkpoint,
    publish,
)
from spear_lightning.distributed.collectives import gather
from spear_lightning.distributed.failures import errors_deferred, first_failure
from spear_lightning.policy.policy import Policy
from spear_lightning.training.hooks import RankState
from spear_lightning.training.module import SpearModule
from spear_lightning.utils.ranges import Positive, in_range

_PACKAGES = ("spear-lightning", "torch", "lightning", "deepspeed", "transformers")
_PARTIAL = ".partial-"


@in_range
class ShardedCheckpoint(Checkpoint):
    """Saves the whole training state every few iterations and after the best validation.

    A checkpoint is a directory, ``<directory>/iteration-00012``, with what the strategy writes (one file, or with
    ``ZeroStrategy`` a shard from each rank) and a ``manifest.json`` of sizes and hashes. It is written under another
    name and published by a rename when all ranks are done, so whenever a process is killed, what carries the name is
    whole. ``--ckpt_path last`` goes on from the one published last; one that has been damaged since is named in the log
    and the newest whole one is used.

    On SIGTERM (pre-emption, a job's time limit) the iteration is finished and saved and training ends; the next
    ``--ckpt_path last`` goes on.

    Args:
        directory: of the checkpoints; ``None`` for ``checkpoints`` in the run directory.
        every_n_iterations: how often to save. The last iteration is always saved.
        keep: how many of the newest are kept, beside the best.
        monitor: metric of the validation that says which is best; ``None`` keeps no best.
        mode: whether the best is the largest (``max``) or the smallest (``min``).
        on_error: what to do if a checkpoint cannot be written (disk full): ``raise``, or ``continue`` with a warning.
            The older checkpoints are intact either way.

    Attributes:
        interrupted: whether SIGTERM has ended training before its last iteration; the same on all ranks.

    Raises:
        ValueError: an argument is out of range.
        MisconfigurationException: the directory cannot be written.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import ShardedCheckpoint
        >>> checkpoint = ShardedCheckpoint(directory="runs/example/checkpoints", every_n_iterations=10, keep=3)
        >>> trainer = Trainer(max_epochs=100, callbacks=[checkpoint], logger=False)
        >>> [iteration for iteration in range(1, 101) if checkpoint.due(iteration, last=100)][-3:]
        [80, 90, 100]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        every_n_iterations: Positive = 1,
        keep: Positive = 2,
        monitor: str | None = "validation/success",
        mode: Literal["max", "min"] = "max",
        on_error: Literal["raise", "continue"] = "raise",
    ) -> None:
        super().__init__()
        self.directory = None if directory is None else Path(directory)
        self.every_n_iterations, self.keep = every_n_iterations, keep
        self.monitor, self.mode, self.on_error = monitor, mode, on_error
        self._sign = 1 if mode == "max" else -1
        self._validated = -1
        self._terminating = False
        self.interrupted = False
        self._run = uuid4().hex

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the checkpoints of a run are."""
        return self.directory or Path(trainer.default_root_dir) / "checkpoints"

    def newest(self, trainer: pl.Trainer) -> Path | None:
        """The checkpoint that ``ckpt_path: last`` stands for."""
        return newest_checkpoint(self.folder(trainer))

    def best(self, trainer: pl.Trainer) -> Path | None:
        """The checkpoint of the best validation of the last run, which ``ckpt_path: best`` stands for."""
        newest = self.newest(trainer)
        return None if newest is None else self._best_of(self._of_run(Manifest.load(newest).run, self.folder(trainer)))

    def due(self, iteration: int, last: int) -> bool:
        """Whether the state after so many iterations is saved, whatever its validation."""
        return iteration % self.every_n_iterations == 0 or iteration == last

    # --- when ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out now whether the directory can be written, not after hours."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        make_folder(self.folder(trainer), "ShardedCheckpoint")
        for left in self.folder(trainer).glob(f"{_PARTIAL}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the SIGTERM of an earlier fit."""
        self._terminating = self.interrupted = False

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on SIGTERM ends training after the iteration."""
        # In place of Lightning's own handler, which talks to the other ranks whatever they are doing at the moment;
        # the trainer puts back what was there before either when it is torn down.
        with suppress(ValueError):  # not the main thread: whoever runs the trainer there handles its signals
            signal.signal(signal.SIGTERM, self._terminate)

    on_train_start = on_sanity_check_start  # there need not be a sanity check

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that this iteration has a validation result."""
        if not trainer.sanity_checking:
            self._validated = trainer.current_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is time, if the validation was the best so far, or if the process is to end."""
        iteration = trainer.current_epoch + 1
        score = None
        if self.monitor is not None and self._validated == trainer.current_epoch:
            value = trainer.callback_metrics.get(self.monitor)
            if value is None:
                raise MisconfigurationException(
                    f"ShardedCheckpoint: monitor {self.monitor!r} was not logged; known are "
                    f"{', '.join(sorted(trainer.callback_metrics))}; or set monitor to null"
                )
            score = float(value)
        terminating = any(gather(self._terminating))
        # Not every rank may see the same files at the same moment: the first one decides.
        best = gather(trainer.is_global_zero and score is not None and self._is_best(score, self.folder(trainer)))[0]
        if terminating or best or self.due(iteration, trainer.max_epochs or -1):
            self._save(trainer, iteration, score)
        if terminating:
            rank_zero_info(f"SIGTERM: saved after iteration {iteration}; --ckpt_path last goes on from here")
            trainer.should_stop = True
            self.interrupted = iteration != trainer.max_epochs

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminating = True

    def state_dict(self) -> dict[str, Any]:
        """The id of the run, by which its checkpoints are told from those of others in the same folder."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the id of the run that is resumed."""
        self._run = state_dict["run"]

    # --- how -----------------------------------------------------------------------------------------------------

    def _save(self, trainer: pl.Trainer, iteration: int, score: float | None) -> None:
        folder = self.folder(trainer)
        partial = folder / f"{_PARTIAL}iteration-{iteration:05d}"
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        ranked = datamodule if isinstance(datamodule, RankState) else None
        files: dict[str, StoredFile] = {}

        def prepare() -> None:
            if trainer.is_global_zero:
                self._check_room(folder)
                shutil.rmtree(partial, ignore_errors=True)
                (partial / RANKS).mkdir(parents=True)

        def write_rank_state() -> None:
            if ranked is not None:
                ranked.save_rank_state(partial / RANKS)

        def write_state() -> None:
            apart = nullcontext() if ranked is None else ranked.rank_state_apart()
            with apart, errors_deferred(trainer.strategy, "save_checkpoint"):
                trainer.save_checkpoint(partial / STATE)

        def describe() -> None:
            files.update(describe_files(partial, file_names(partial)[trainer.global_rank :: trainer.world_size]))

        def finish() -> None:
            # Every rank gets here, or none.
            everywhere = {name: entry for part in gather(files) for name, entry in part.items()}
            if trainer.is_global_zero:
                self._manifest(trainer, iteration, score, everywhere).save(partial)
                publish(partial, folder, iteration)
                self._prune(folder)

        for step in (prepare, write_rank_state, write_state, describe, finish):
            failure = first_failure(step)
            if failure is not None:
                return self._failed(trainer, iteration, partial, failure)
        return None

    def _manifest(
        self, trainer: pl.Trainer, iteration: int, score: float | None, files: dict[str, StoredFile]
    ) -> Manifest:
        policy = getattr(trainer.lightning_module, "policy", None)
        return Manifest(
            iteration=iteration,
            written=time.time(),
            world_size=trainer.world_size,
            strategy=type(trainer.strategy).__name__,
            stage=getattr(trainer.strategy, "stage", None),
            versions=dict.fromkeys(_PACKAGES, "not installed")
            | {name: found.version for name in _PACKAGES for found in distributions(name=name)},
            score=score,
            run=self._run,
            files=files,
            policy=policy.fingerprint() if isinstance(policy, Policy) else None,
        )

    def _failed(self, trainer: pl.Trainer, iteration: int, partial: Path, failure: str) -> None:
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        message = f"the checkpoint after iteration {iteration} could not be written to {partial.parent}: {failure}"
        if self.on_error == "raise":
            raise OSError(f"{message}; older checkpoints are intact")
        rank_zero_warn(f"{message}; training goes on, older checkpoints are intact")

    def _check_room(self, folder: Path) -> None:
        """Raise ``OSError`` if the disk has no room for another checkpoint like the newest."""
        for newest in complete_checkpoints(folder)[:1]:
            needed = sum(entry.size for entry in Manifest.load(newest).files.values())
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise OSError(f"it needs about {needed / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free")

    def _is_best(self, score: float, folder: Path) -> bool:
        scores = [known.score for _, known in self._of_run(self._run, folder) if known.score is not None]
        return all(self._sign * score > self._sign * known for known in scores)

    def _of_run(self, run: str, folder: Path) -> list[tuple[Path, Manifest]]:
        """Its checkpoints, the newest first. Those of another run in the folder are not ours to compare or remove."""
        found = ((path, Manifest.load(path)) for path in complete_checkpoints(folder))
        return [(path, manifest) for path, manifest in found if manifest.run == run]

    def _best_of(self, checkpoints: list[tuple[Path, Manifest]]) -> Path | None:
        scored = [(self._sign * known.score, path) for path, known in checkpoints if known.score is not None]
        return max(scored, key=itemgetter(0))[1] if scored else None

    def _prune(self, folder: Path) -> None:
        newest_first = self._of_run(self._run, folder)
        best = None if self.monitor is None else self._best_of(newest_first)
        for path, _ in newest_first[self.keep :]:
            if path != best:
                discard(path)


def resolve_checkpoint(
    given: str | os.PathLike[str], trainer: pl.Trainer, module: pl.LightningModule | None = None
) -> str | None:
    """What a ``ckpt_path`` stands for, in a form that the trainer's strategy loads.

    Args:
        given: ``last`` or ``best`` of the trainer's :class:`ShardedCheckpoint`, or a path; what is not a checkpoint of
            this kind is handed back as it is.
        trainer: that will load it.
        module: that it will be loaded into; its policy is compared with the checkpoint's.

    Returns:
        The path; ``None`` for ``last`` where nothing has been saved yet, so that a job can always be started the same
        way.

    Raises:
        MisconfigurationException: the checkpoint is not whole, or of another number of ranks or another model; names
            file and fix.
    """
    callback = next((each for each in trainer.checkpoint_callbacks if isinstance(each, ShardedCheckpoint)), None)
    if callback is not None and given in ("last", "best"):
        found = callback.newest(trainer) if given == "last" else callback.best(trainer)
        if found is None and given == "best":
            raise MisconfigurationException(
                f"ckpt_path: best, but no checkpoint with a validation result is in {callback.folder(trainer)}"
            )
        if found is None:
            rank_zero_info(f"no checkpoint in {callback.folder(trainer)} yet: starting from the beginning")
            return None
    else:
        found = Path(given)
        if not (found / MANIFEST).exists():
            return os.fspath(given)
    try:
        manifest = load_complete(found)
    except ValueError as error:
        raise MisconfigurationException(f"ckpt_path: {error}; give another one") from error
    if manifest.ranks not in (None, trainer.world_size):
        raise MisconfigurationException(
            f"ckpt_path: {found} was written by {manifest.ranks} ranks under ZeRO, and this run has "
            f"{trainer.world_size}: run `spear reshard {found}` first, or set trainer.devices and trainer.num_nodes to "
            "what it had"
        )
    if manifest.policy is not None and isinstance(module, SpearModule):
        module.check_policy(manifest.policy)
    return str(found / STATE)

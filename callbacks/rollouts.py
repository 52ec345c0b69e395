"""Write every episode down: records for programs, transcripts for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from spear_lightning.callbacks.logs import completed_iterations, make_folder
from spear_lightning.callbacks.transcripts import notable, pick, record, transcript
from spear_lightning.distributed.collectives import gather
from spear_lightning.environments.base import Split
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.utils.atomic import write_atomically
from spear_lightning.utils.ranges import Positive, in_range

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@in_range
class RolloutLog(Callback, RolloutHooks):
    """Writes every episode as one line of JSON, and the best, the worst and a random training episode for reading.

    The files are::

        <directory>/train/iteration-00012-rank-0.jsonl       # episodes of one rank
        <directory>/train/iteration-00012.md                 # best, worst and random episode of all ranks
        <directory>/validation/iteration-00010-rank-0.jsonl  # after 10 iterations; 0 is before training

    A file is there as a whole or not at all, whenever the run is killed; the same iteration played again replaces it. A
    line is strict ASCII JSON whatever the policy wrote (lone surrogates become U+FFFD, numbers that are not finite
    become ``null``). The transcripts also go to every logger with a text tab (TensorBoard).

    Args:
        directory: where to write; ``None`` for ``rollouts`` in the trainer's log directory.
        every_n_iterations: of training, how many iterations to advance from one that is written to the next.
            Validation and test are always written; to write no training episodes leave ``train`` out of ``splits``.
        transcripts: whether to write the best, worst and random episode.
        splits: which of ``train``, ``validation`` and ``test`` are written.

    Raises:
        ValueError: ``every_n_iterations`` is out of range.
        MisconfigurationException: there is no such split, or the directory cannot be written.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import RolloutLog
        >>> log = RolloutLog(directory="runs/example/rollouts", every_n_iterations=10, splits=["train"])
        >>> trainer = Trainer(callbacks=[log], logger=False, enable_checkpointing=False)
        >>> log.path("train", 20, rank=0).name
        'iteration-00020-rank-0.jsonl'
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        every_n_iterations: Positive = 1,
        transcripts: bool = True,
        splits: Sequence[Split] = _SPLITS,
    ) -> None:
        super().__init__()
        self.directory = None if directory is None else Path(directory)
        self.every_n_iterations = every_n_iterations
        self.transcripts = transcripts
        self.splits = tuple(splits)
        unknown = [split for split in self.splits if split not in _SPLITS]
        if unknown:
            raise MisconfigurationException(f"RolloutLog: splits may hold {', '.join(_SPLITS)}; not {unknown[0]!r}")
        self._folder = self.directory or Path("rollouts")
        # Parts of one evaluation phase that were written already: each gets a file of its own.
        self._parts: dict[Path, int] = {}

    def path(self, split: Split, iteration: int, rank: int, part: int = 0) -> Path:
        """The file of one rank's episodes.

        Args:
            split: which tasks were played.
            iteration: of training, its number; of evaluation, how many iterations were done before it.
            rank: of the process.
            part: number of the part, where a phase is played in several.
        """
        suffix = f"-part-{part}" if part else ""
        return self._folder / split / f"iteration-{iteration:05d}-rank-{rank}{suffix}.jsonl"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the directory and make sure that it can be written, before anything is played."""
        # log_dir is agreed on by all ranks, so every rank has to ask for it.
        log_dir = Path(trainer.log_dir or trainer.default_root_dir)
        self._folder = self.directory or log_dir / "rollouts"
        self._parts.clear()
        make_folder(self._folder, "RolloutLog")

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Write the episodes."""
        training = rollout.split == "train"
        if rollout.split not in self.splits or (training and rollout.iteration % self.every_n_iterations):
            return
        iteration = rollout.iteration if training else completed_iterations(trainer)
        rank = trainer.global_rank
        episodes = (*rollout.episodes, *rollout.aborted)
        entries = [record(rollout.split, iteration, rank, episode) for episode in episodes]
        lines = [json.dumps(entry, ensure_ascii=True, allow_nan=False) + "\n" for entry in entries]
        whole = self.path(rollout.split, iteration, rank)
        part = self._parts.get(whole, 0)
        self._parts[whole] = part + 1
        write_atomically(self.path(rollout.split, iteration, rank, part), "".join(lines))
        if training and self.transcripts:
            self._write_transcripts(trainer, rollout)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new phase begins."""
        self._parts.clear()

    on_validation_start = on_test_start = on_predict_start = on_train_epoch_start

    def _write_transcripts(self, trainer: pl.Trainer, rollout: Rollout) -> None:
        rendered = {
            name: (key, transcript(f"Iteration {rollout.iteration}: {name} episode", episode))
            for name, (key, episode) in notable(rollout).items()
        }
        chosen = pick(gather(rendered))
        if not trainer.is_global_zero or not chosen:
            return
        write_atomically(
            self._folder / rollout.split / f"iteration-{rollout.iteration:05d}.md", "\n".join(chosen.values())
        )
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                for name, text in chosen.items():
                    add_text(f"rollouts/{name}", text, rollout.iteration)

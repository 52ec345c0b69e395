"""Hooks added to Lightning's: a callback that inherits one of these classes is called around rollouts or updates.

A callback opts in by inheriting::

    class CountEpisodes(Callback, RolloutHooks):
        def on_rollout_end(self, trainer, pl_module, rollout):
            print(len(rollout.episodes))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from spear_lightning.algorithm import PolicyLoss
from spear_lightning.rollout.runner import PolicyOwner

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from spear_lightning.data.samples import Sample
    from spear_lightning.environments.base import Split
    from spear_lightning.rollout.episode import Rollout


class RolloutHooks:
    """Called on every rank around each rollout phase: training, validation, test and prediction."""

    def on_rollout_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split, episodes: int) -> None:
        """Before the first episode; ``episodes`` is the number this rank will play.

        With ``data.rollouts.max_staleness: 1`` it is told when the iteration begins to wait for its episodes, some or
        all of which are played by then. With ``data.rollouts.resample`` it is told once for each round of an
        iteration, and ``finished`` counts from 0 again; such a round may have no episode for this rank.
        """

    def on_rollout_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, finished: int, active: int) -> None:
        """After a step of the environments: episodes ``finished`` so far and still ``active``."""

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """After the episodes are scored, filtered and given advantages, before the first update on them."""


def rollout_listeners(trainer: pl.Trainer) -> Iterator[RolloutHooks]:
    """All objects with rollout hooks: the module first, then the callbacks in order."""
    for target in (trainer.lightning_module, *trainer.callbacks):  # type: ignore[attr-defined]
        if isinstance(target, RolloutHooks):
            yield target


def start_rollout(trainer: pl.Trainer, split: Split, episodes: int) -> Callable[[int, int], None]:
    """Call ``on_rollout_start`` of all listeners.

    Args:
        trainer: has the listeners.
        split: of the tasks.
        episodes: that this rank will play.

    Returns:
        Calls their ``on_rollout_step`` with the number of episodes finished and active.
    """
    module, listeners = trainer.lightning_module, list(rollout_listeners(trainer))
    for listener in listeners:
        listener.on_rollout_start(trainer, module, split, episodes)

    def on_step(finished: int, active: int) -> None:
        for listener in listeners:
            listener.on_rollout_step(trainer, module, finished, active)

    return on_step


def update_listeners(trainer: pl.Trainer) -> Iterator[UpdateHooks]:
    """All callbacks with update hooks, in order."""
    for target in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(target, UpdateHooks):
            yield target


@dataclass(frozen=True, slots=True)
class MicroBatchOutput:
    """What the update computed on one micro-batch; tensors are detached, ``(samples, tokens)``.

    Attributes:
        source: ``"fresh"`` or ``"replay"``.
        entropies: policy entropy in nats at each token.
        mask: 1 at tokens that carry a gradient.
        turns: number of the turn that generated each token; -1 elsewhere.
        lengths: tokens of each sequence that attend to each other, padding not counted, ``(sequences,)``.
    """

    source: str
    entropies: torch.Tensor
    mask: torch.Tensor
    turns: torch.Tensor
    lengths: torch.Tensor


class UpdateHooks:
    """Called on every rank during the update."""

    def on_micro_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, output: MicroBatchOutput) -> None:
        """After the backward pass of one micro-batch."""


class RankState(ABC):
    """A data module that holds something else on each rank (its part of the replay buffer).

    For checkpoints of any kind its ``state_dict`` gathers that of all ranks, since what one rank writes is often all
    that is written. A checkpoint that has a place for each rank's own state saves it there instead.
    """

    @abstractmethod
    def save_rank_state(self, folder: Path) -> None:
        """Write what this rank alone holds into a folder that is there, in a file of its own.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def rank_state_apart(self) -> AbstractContextManager[None]:
        """Within it ``state_dict`` leaves out what :meth:`save_rank_state` has written."""


class Learner(PolicyOwner, Protocol):
    """What data module and watchers know of the module that trains.

    Attributes:
        trainer: that it belongs to.
        loss: of fresh samples.
        replay_loss: of replayed ones.
        imitation_weight: γ(t).
    """

    trainer: Any
    loss: PolicyLoss
    replay_loss: PolicyLoss
    imitation_weight: float

    def correct(
        self, samples: Mapping[str, Sample], pad_id: int, max_tokens: int, temperature: float
    ) -> dict[str, Sample]:
        """Samples with the old log-probabilities that the update is to compare with."""

    def record_counts(self, values: dict[str, float]) -> None:
        """Log numbers that hold for the whole run."""

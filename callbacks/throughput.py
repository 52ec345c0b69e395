"""How fast a run is, where an iteration's time goes, and how much of the hardware's arithmetic the update uses."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback

from spear_lightning.callbacks.logs import log_iteration
from spear_lightning.distributed.collectives import gather
from spear_lightning.policy.flops import ModelShape, linear_weights, model_flops, shape_of
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import MicroBatchOutput, RolloutHooks, UpdateHooks
from spear_lightning.utils.ranges import Above0, in_range

_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


@in_range
class ThroughputMonitor(Callback, RolloutHooks, UpdateHooks):
    """Logs speed, the parts of an iteration's time and the utilisation of the device, over all ranks.

    Counts are summed over ranks, seconds are those of the slowest. At the end of each iteration:

    - ``time/iteration``: all of it but validations and the writing of checkpoints,
    - ``time/rollout``: until the first minibatch is there. Generation, environments, handing weights over and the rest
      are logged without this callback (``time/rollout_generation``, ``_environment``, ``_sync``, ``_other``); where the
      next rollouts are played during the update, they add up to more than this,
    - ``time/training``: from the first minibatch to the end of the last update,
    - ``time/other``: what is left of the iteration,
    - ``rollout/episodes_per_second``, beside ``rollout/tokens_per_second``, which is always logged,
    - ``update/tokens_per_second``: tokens that went through the update, prompts included and padding not,
    - ``time/mfu``: model FLOPs utilisation, the operations that forward and backward pass of the policy need over
      ``time/training`` and the peak of all devices. Recomputed layers, masked halves of causal attention and a
      reference policy are no part of what is needed.

    Lightning has a callback of the same name, so configurations give the class path in full,
    ``spear_lightning.callbacks.ThroughputMonitor``.

    Args:
        peak_flops: operations per second of one rank's device: a number; ``auto`` for the maker's figure of known GPUs,
            ``measure``'s of others, and none on a CPU (no utilisation is logged); ``measure`` for that of a plain
            matrix product in the same precision and with the same threads, tried once when training starts.

    Raises:
        MisconfigurationException: ``peak_flops`` is not above 0, nor one of the words.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import ThroughputMonitor
        >>> monitor = ThroughputMonitor(peak_flops="measure")
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
        >>> ThroughputMonitor(peak_flops=989e12).peak_flops  # bfloat16 on an H100
        989000000000000.0
    """

    def __init__(self, peak_flops: Above0 | Literal["auto", "measure"] = "auto") -> None:
        super().__init__()
        self.peak_flops = peak_flops
        self._model: tuple[ModelShape, int] | None = None
        self._peak = 0.0
        self._forget()

    def _forget(self) -> None:
        self._start = time.perf_counter()
        self._first: float | None = None
        self._last = self._start
        self._validation = self._validation_start = 0.0
        self._played, self._episodes = 0.0, 0
        self._counts: torch.Tensor | None = None

    # --- what is counted -----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the policy's shape, before a strategy partitions it."""
        policy = getattr(pl_module, "policy", None)
        if stage == "fit" and isinstance(policy, Policy):
            self._model = shape_of(policy.model), linear_weights(policy.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the peak."""
        if self._model is None:
            return
        device, dtype = pl_module.device, _dtype_of(trainer, pl_module)
        if self.peak_flops == "measure":
            self._peak = matmul_flops(device, dtype)
        elif isinstance(self.peak_flops, str):
            self._peak = 0.0 if device.type == "cpu" else _makers_flops(device, dtype) or matmul_flops(device, dtype)
        else:
            self._peak = self.peak_flops

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of an iteration."""
        self._forget()

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Count the episodes."""
        if rollout.split == "train":
            self._episodes += len(rollout.episodes)
            self._played += sum(rollout.seconds.values())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first minibatch ends the rollout phase."""
        if self._first is None:
            _finish(pl_module.device)
            self._first = time.perf_counter()

    def on_micro_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, output: MicroBatchOutput) -> None:
        """Count tokens on the device: nothing waits for it."""
        lengths = output.lengths.double()
        counts = torch.stack([lengths.sum(), (lengths * lengths).sum(), output.mask.sum().double()])
        self._counts = counts if self._counts is None else self._counts + counts

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The last update ends the training phase; only then is a device waited for."""
        if trainer.is_last_batch:
            _finish(pl_module.device)
        self._last = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A validation is no part of the iteration."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The iteration goes on."""
        self._validation += time.perf_counter() - self._validation_start

    # --- what is logged ------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the iteration."""
        first = self._last if self._first is None else self._first
        tokens, squares, predicted = (0.0, 0.0, 0.0) if self._counts is None else self._counts.tolist()
        flops = model_flops(*self._model, tokens, squares, predicted) if self._model else 0.0
        whole = time.perf_counter() - self._start - self._validation
        seconds = (whole, first - self._start, self._played, self._last - first)
        counts = (self._episodes, int(tokens), flops, self._peak)
        log_iteration(trainer, pl_module, _figures(gather((seconds, counts))))


def _figures(ranks: Sequence[tuple[tuple[float, ...], tuple[float, ...]]]) -> dict[str, float]:
    """What is logged.

    Args:
        ranks: of each the seconds of the iteration, its rollout, the playing of it and the update; and its number of
            episodes and of tokens, its operations and the peak of its device (0: unknown).
    """
    seconds, counts = zip(*ranks, strict=True)
    whole, rollout, played, update = (max(column) for column in zip(*seconds, strict=True))
    episodes, tokens, flops, peak = (sum(column) for column in zip(*counts, strict=True))
    values = {
        "time/iteration": whole,
        "time/rollout": rollout,
        "time/training": update,
        "time/other": max(0.0, whole - rollout - update),
    }
    if played > 0:
        values["rollout/episodes_per_second"] = episodes / played
    if tokens and update > 0:
        values["update/tokens_per_second"] = tokens / update
        if all(of_rank[-1] for of_rank in counts):
            values["time/mfu"] = flops / (update * peak)
    return values


def _makers_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second as the maker of a device states them; ``None`` if they are not known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a GPU that the library does not know
        return get_available_flops(device, dtype)


@torch.no_grad()
def matmul_flops(device: torch.device, dtype: torch.dtype, tries: int = 5) -> float:
    """Operations per second of a plain matrix product, the best of a few tries after a warm-up.

    Args:
        device: to try.
        dtype: of the matrices.
        tries: how many.
    """
    size = 1024 if device.type == "cpu" else 8192
    # Not ones: a GPU multiplies what is regular faster than what is not.
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    seconds = []
    for _ in range(1 + tries):
        _finish(device)
        started = time.perf_counter()
        left @ left
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def _finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _dtype_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> torch.dtype:
    """That the update multiplies matrices in."""
    found = (dtype for name, dtype in _DTYPES.items() if str(trainer.precision).startswith(name))
    return next(found, next(pl_module.parameters()).dtype)

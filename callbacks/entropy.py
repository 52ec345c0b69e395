"""Watch the policy's entropy: exploration ends when it collapses, and the policy when it explodes."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from spear_lightning.callbacks.logs import log_iteration
from spear_lightning.distributed.collectives import total
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.hooks import MicroBatchOutput, RolloutHooks, UpdateHooks
from spear_lightning.utils.ranges import AtLeast0, Positive, in_range

# Where entropies come from: generation, and the update on fresh and on replayed episodes.
_PHASES = {"fresh": "update", "replay": "replay"}


@in_range
class EntropyMonitor(Callback, RolloutHooks, UpdateHooks):
    """Measures the exact policy entropy per token, by position of the turn, and acts when it leaves its bounds.

    The entropy is that of the whole next-token distribution at the sampling temperature, averaged over tokens — not an
    estimate from the log-probabilities of the tokens that were drawn. It is taken three times in an iteration, over all
    ranks, and logged at its end:

    - ``entropy/rollout``: at each token generated in the rollout (engines that do not tell it leave it out),
    - ``entropy/update``: at each fresh token that carries a gradient, as the update sees it,
    - ``entropy/replay``: the same for replayed tokens,

    each also by turn, for example ``entropy/rollout/turns_3-4``. An iteration is *collapsed* when its entropy
    (``rollout`` if known, else ``update``) is below the lower bound and *exploded* when it is above the upper bound or
    not finite. After ``patience`` such iterations in a row the monitor warns or stops the run.

    Args:
        lower: collapse bound in nats per token, or ``None`` for none.
        upper: explosion bound in nats per token, or ``None`` for none. A uniform policy has ``log(vocabulary size)``.
        relative_lower: collapse bound as a share of the entropy of the first iteration, or ``None``. Where both are
            given the tighter one holds.
        relative_upper: explosion bound as a multiple of the entropy of the first iteration, or ``None``.
        patience: number of consecutive iterations out of bounds before anything is done.
        action: ``"warn"``, or ``"stop"`` to end training after the iteration (Lightning's ``min_epochs`` is respected).
        positions: first turns of the bins, from 1, increasing; the last bin is open. Empty for no breakdown.

    Raises:
        ValueError: a number is out of range.
        MisconfigurationException: the bounds exclude each other, or the positions do not increase.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import EntropyMonitor
        >>> monitor = EntropyMonitor(lower=0.05, relative_upper=3.0, patience=5, action="stop", positions=[1, 2, 5])
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
        >>> monitor.bins
        ['turn_1', 'turns_2-4', 'turns_5+']
    """

    def __init__(
        self,
        lower: AtLeast0 | None = 0.01,
        upper: AtLeast0 | None = 5.0,
        relative_lower: AtLeast0 | None = None,
        relative_upper: AtLeast0 | None = None,
        patience: Positive = 3,
        action: Literal["warn", "stop"] = "warn",
        positions: Sequence[int] = (1, 2, 3, 5, 9, 17, 33),
    ) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper
        self.relative_lower, self.relative_upper = relative_lower, relative_upper
        self.patience, self.action = patience, action
        self.positions = tuple(positions)
        self._first: float | None = None
        self._out_of_bounds: list[float] = []
        self._which = ""
        self._sums: dict[str, torch.Tensor] = {}  # of a phase: (2, 1 + bins), sums of entropies and counts of tokens
        for low, high in (("lower", "upper"), ("relative_lower", "relative_upper")):
            lowest, highest = getattr(self, low), getattr(self, high)
            if lowest is not None and highest is not None and lowest >= highest:
                raise MisconfigurationException(f"EntropyMonitor: {low}={lowest} must be below {high}={highest}")
        if any(position <= before for before, position in pairwise((0, *self.positions))):
            raise MisconfigurationException(
                f"EntropyMonitor: positions must be increasing turn numbers from 1, not {list(self.positions)}"
            )

    @property
    def bins(self) -> list[str]:
        """Names of the bins of turns, in order."""
        closed = [
            f"turn_{first}" if following == first + 1 else f"turns_{first}-{following - 1}"
            for first, following in pairwise(self.positions)
        ]
        return closed + [f"turns_{last}+" for last in self.positions[-1:]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a half-done iteration of an earlier run."""
        self._sums.clear()

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: Rollout) -> None:
        """Add up the entropies of the generated tokens."""
        if rollout.split != "train":
            return
        turns = [
            (number, turn.entropies.astype(np.float64))
            for item in rollout.episodes
            for number, turn in enumerate(item.turns)
        ]
        if not turns:
            return
        entropies = np.concatenate([values for _, values in turns])
        numbers = np.repeat([number for number, _ in turns], [len(values) for _, values in turns])
        known = ~np.isnan(entropies)
        ones = torch.ones(int(known.sum()))
        self._add("rollout", torch.from_numpy(entropies[known]), torch.from_numpy(numbers[known]), ones)

    def on_micro_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, output: MicroBatchOutput) -> None:
        """Add up the entropies of the trained tokens, on the device: nothing waits for it."""
        self._add(_PHASES[output.source], output.entropies.flatten(), output.turns.flatten(), output.mask.flatten())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the iteration after its last update, so that a checkpoint made by the validation has the verdict."""
        if trainer.is_last_batch:
            self._finish_iteration(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge an iteration that was cut short (``max_steps``)."""
        self._finish_iteration(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: the first entropy and the iterations out of bounds.

        Sums of a half-done iteration are left out: each rank has its own, and its rollout is reported again.
        """
        return {"first": self._first, "out_of_bounds": list(self._out_of_bounds), "which": self._which}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._first = state_dict["first"]
        self._out_of_bounds = list(state_dict["out_of_bounds"])
        self._which = state_dict["which"]

    def _add(self, phase: str, entropies: torch.Tensor, turns: torch.Tensor, mask: torch.Tensor) -> None:
        """Add sums of entropies and counts of tokens, ``(2, 1 + bins)``, the first column over all turns."""
        live = mask.bool()
        values = entropies.double()
        edges = torch.tensor(self.positions, device=turns.device, dtype=torch.long)
        # Turns count from 0 in the arrays and from 1 for people; bin -1 holds turns before the first position.
        index = torch.bucketize(turns.long() + 1, edges, right=True) - 1
        columns = [live, *(live & (index == number) for number in range(len(self.positions)))]
        members = torch.stack([column.double() for column in columns])
        # Not a matrix product: what stands at masked tokens may be NaN, and 0 · NaN is NaN.
        sums = torch.stack([torch.where(column, values, 0.0).sum() for column in columns])
        self._sums[phase] = torch.stack([sums, members.sum(dim=1)]) + self._sums.get(phase, 0.0)

    def _finish_iteration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        entropies, counts = dict[str, float](), dict[str, float]()
        for phase, sums in self._sums.items():
            names = [phase, *(f"{phase}/{name}" for name in self.bins)]
            of_entropy, of_tokens = sums.tolist()
            entropies.update(zip(names, of_entropy, strict=True))
            counts.update(zip(names, of_tokens, strict=True))
        self._sums.clear()
        entropies, counts = total(entropies), total(counts)
        means = {name: entropies[name] / count for name, count in counts.items() if count > 0}
        if means:
            log_iteration(trainer, pl_module, {f"entropy/{name}": value for name, value in sorted(means.items())})
            self._judge(trainer, means)

    def _judge(self, trainer: pl.Trainer, means: Mapping[str, float]) -> None:
        source = "rollout" if "rollout" in means else "update"
        if source not in means:
            return
        entropy = means[source]
        if self._first is None and math.isfinite(entropy):
            self._first = entropy
        which, bound = self._violation(entropy)
        if which != self._which:
            self._out_of_bounds.clear()
        self._which = which
        if not which:
            return
        self._out_of_bounds.append(entropy)
        streak = len(self._out_of_bounds)
        if streak < self.patience:
            return
        stop = self.action == "stop"
        # A warning is repeated, but not in every iteration.
        if stop or streak % self.patience == 0:
            rank_zero_warn(self._message(which, bound, source, trainer.current_epoch, stop))
        trainer.should_stop = trainer.should_stop or stop

    def _violation(self, entropy: float) -> tuple[str, str]:
        """``("collapsed" | "exploded" | "", the bound that was crossed)``."""
        if not math.isfinite(entropy):
            return "exploded", "it is not finite"
        for which, word, side, crossed in (
            ("collapsed", "below", "lower", operator.lt),
            ("exploded", "above", "upper", operator.gt),
        ):
            bound, share = getattr(self, side), getattr(self, f"relative_{side}")
            if bound is not None and crossed(entropy, bound):
                return which, f"{word} {side}={bound:g}"
            if share is not None and self._first is not None and crossed(entropy, share * self._first):
                return which, f"{word} relative_{side}={share:g} of the first iteration's {self._first:.4g}"
        return "", ""

    def _message(self, which: str, bound: str, source: str, iteration: int, stop: bool) -> str:
        values = ", ".join(f"{value:.4g}" for value in self._out_of_bounds[-self.patience :])
        suggestion = {
            "collapsed": "The policy has stopped exploring: lower the learning rate, raise clip_high, drop more tokens "
            "with clip-cov, or begin self-imitation later (imitation_warmup)",
            "exploded": "The policy is losing what it knew: lower the learning rate or max_grad_norm, or add a KL "
            "penalty",
        }[which]
        end = "Training stops (EntropyMonitor action: stop)." if stop else "Training goes on (action: warn)."
        return (
            f"Policy entropy has {which}: {bound} nats per token for {len(self._out_of_bounds)} iterations up to "
            f"iteration {iteration} (the last, from the {source}: {values}). {end} {suggestion}."
        )

"""Behaviour cloning: cross entropy on the tokens of the expert's actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from spear_lightning.sft.data import Batch, WarmstartDataModule
from spear_lightning.sft.demonstrations import TokenRow
from spear_lightning.utils.randomness import stream_seed


@dataclass(frozen=True)
class Optimization:
    """How the policy is fitted to the demonstrations.

    Args:
        learning_rate: peak of AdamW's learning rate; it rises over the first ``warmup`` share of all steps, then falls
            linearly to a tenth.
        weight_decay: of AdamW, on matrices only.
        warmup: share of the steps.
        batch_size: demonstrations per step.
        epochs: passes over the demonstrations.
        max_grad_norm: gradients are clipped to this norm.
        observation_weight: weight of the cross entropy on what the environment says. It is no part of the policy, but
            learning to foresee it ("take the mug 1" ... "you pick up the mug 1") teaches copying sooner.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.03
    batch_size: int = 16
    epochs: int = 9
    max_grad_norm: float = 1.0
    observation_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "epochs", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimization.{name} must be above 0, got {getattr(self, name)}.")
        if self.observation_weight < 0:
            raise ValueError(f"optimization.observation_weight must not be negative, got {self.observation_weight}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optimization.warmup must be in [0, 1), got {self.warmup}.")


class _Loss(NamedTuple):
    actions: torch.Tensor  # mean cross entropy over the expert's action tokens
    observations: torch.Tensor  # mean cross entropy over all other tokens
    accuracy: torch.Tensor  # share of action tokens that the most likely token is
    tokens: int  # number of action tokens


class WarmstartModule(pl.LightningModule):
    """Clones demonstrations into a causal language model.

    Args:
        model: a Hugging Face causal language model.
        optimization: how it is fitted.
    """

    def __init__(self, model: torch.nn.Module, optimization: Optimization = Optimization()) -> None:
        super().__init__()
        self.model = model
        self._optimization = optimization

    def _loss(self, batch: Batch) -> _Loss:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        # The logits at token i predict token i + 1.
        predicted, wanted = logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten()
        actions = batch["mask"][:, 1:].flatten()
        others = batch["attention_mask"][:, 1:].flatten().bool() & ~actions
        losses = functional.cross_entropy(predicted, wanted, reduction="none")
        right = (predicted.detach().argmax(-1) == wanted).float()
        return _Loss(losses[actions].mean(), losses[others].mean(), right[actions].mean(), int(actions.sum()))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy over the action tokens of the batch, plus the weighted one over the rest."""
        loss = self._loss(batch)
        self._report("", loss)
        return loss.actions + self._optimization.observation_weight * loss.observations

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same on demonstrations of games that are not learned from."""
        self._report("validation_", self._loss(batch))

    def _report(self, prefix: str, loss: _Loss) -> None:
        values = {f"warmstart/{prefix}loss": loss.actions, f"warmstart/{prefix}accuracy": loss.accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=loss.tokens, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and decay, stepped after every batch."""
        settings = self._optimization
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
        )
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rise = max(1, round(settings.warmup * total))

        def factor(step: int) -> float:
            return (step + 1) / rise if step < rise else 1 - 0.9 * (step - rise) / max(1, total - rise)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit_rows(
    network: PreTrainedModel,
    train: Sequence[TokenRow],
    validation: Sequence[TokenRow],
    optimization: Optimization,
    seed: int,
) -> None:
    """Clone demonstrations into a model, in place; it is left in evaluation mode.

    Args:
        network: a causal language model.
        train: rows to learn from.
        validation: rows for the validation loss.
        optimization: how.
        seed: of the order of batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("warmstart", seed))
        trainer = pl.Trainer(
            max_epochs=optimization.epochs,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=optimization.max_grad_norm,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=optimization.epochs,
        )
        trainer.fit(
            WarmstartModule(network, optimization),
            WarmstartDataModule(train, validation, optimization.batch_size, seed),
        )
    network.train(False)

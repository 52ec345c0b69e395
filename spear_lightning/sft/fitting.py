"""Fitting a model to demonstrations with Lightning, on one CPU process."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from transformers import PreTrainedModel

from spear_lightning.sft.data import WarmstartDataModule
from spear_lightning.sft.demonstrations import TokenRow
from spear_lightning.sft.module import Optimization, WarmstartModule
from spear_lightning.utils.randomness import stream_seed


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

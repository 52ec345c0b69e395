"""Behaviour cloning: cross entropy on the tokens of the expert's actions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import lightning.pytorch as pl
import numpy as np
import torch
from annotated_types import Ge, Lt
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel

from spear_lightning.agents.base import Ids
from spear_lightning.data.micro_batches import MicroBatch, micro_batch_of
from spear_lightning.data.samples import Sample
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import Above0, AtLeast0, Positive, in_range

collate = partial(micro_batch_of, pad_id=0, source="fresh")


@in_range
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
        ValueError: a number is out of range.
    """

    learning_rate: Above0 = 3e-3
    weight_decay: float = 0.01
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.03
    batch_size: Positive = 16
    epochs: Positive = 9
    max_grad_norm: Above0 = 1.0
    observation_weight: AtLeast0 = 0.0


def sample_of(pieces: Iterable[tuple[Ids, bool]]) -> Sample:
    """Pieces of tokens as one training sample.

    Args:
        pieces: token ids int32 ``(tokens,)``, each with whether they are to be learned.
    """
    parts = list(pieces)
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int32)
    mask = np.concatenate([np.full(len(ids), learned) for ids, learned in parts])
    nothing = np.zeros(len(ids), np.float32)
    return Sample(ids, mask, nothing, nothing, np.where(mask, 0, -1).astype(np.int16))


class LengthBatches(Sampler[list[int]]):
    """Batches of samples of similar length, in a new random order each epoch; equal seeds, equal batches.

    Args:
        lengths: of the samples, in tokens.
        batch_size: samples per batch.
        seed: of the shuffling.
    """

    _POOL = 8  # batches that are sorted by length together: little padding, and batches still mix all kinds of games

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng(stream_seed("warmstart", self._seed, self._epoch))
        self._epoch += 1
        order = random.permutation(len(self._lengths))
        size = self._batch_size
        batches = []
        for start in range(0, len(order), self._POOL * size):
            pool = order[start : start + self._POOL * size]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
        yield from (batches[i] for i in random.permutation(len(batches)))


class CloningModule(pl.LightningModule):
    """Clones demonstrations into a causal language model.

    Args:
        model: a Hugging Face causal language model.
        optimization: how it is fitted.
    """

    def __init__(self, model: torch.nn.Module, optimization: Optimization = Optimization()) -> None:
        super().__init__()
        self.model = model
        self._optimization = optimization

    def _losses(self, batch: MicroBatch, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy over the expert's action tokens, and over all other tokens; the first one is logged."""
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        # The logits at token i predict token i + 1.
        predicted, wanted = logits[:, :-1].flatten(0, 1).float(), batch.input_ids[:, 1:].flatten()
        actions = batch.response_mask[:, 1:].flatten().bool()
        others = batch.attention_mask[:, 1:].flatten().bool() & ~actions
        losses = functional.cross_entropy(predicted, wanted, reduction="none")
        right = (predicted.detach().argmax(-1) == wanted).float()
        loss = losses[actions].mean()
        values = {f"{prefix}loss": loss, f"{prefix}accuracy": right[actions].mean()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=int(actions.sum()), prog_bar=True)
        return loss, losses[others].mean()

    def training_step(self, batch: MicroBatch, batch_idx: int) -> torch.Tensor:
        """Mean cross entropy over the action tokens of the batch, plus the weighted one over the rest."""
        actions, observations = self._losses(batch, "sft/")
        return actions + self._optimization.observation_weight * observations

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """The same on demonstrations of games that are not learned from."""
        self._losses(batch, "sft/validation_")

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


def fit_samples(
    network: PreTrainedModel,
    train: Sequence[Sample],
    validation: Sequence[Sample],
    optimization: Optimization,
    seed: int,
) -> None:
    """Clone demonstrations into a model, in place; it is left in evaluation mode.

    Args:
        network: a causal language model.
        train: to learn from.
        validation: for the validation loss.
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
        batches = LengthBatches([len(sample) for sample in train], optimization.batch_size, seed)
        trainer.fit(
            CloningModule(network, optimization),
            DataLoader(train, batch_sampler=batches, collate_fn=collate),  # type: ignore[arg-type]
            DataLoader(validation, batch_size=4 * optimization.batch_size, collate_fn=collate),  # type: ignore[arg-type]
        )
    network.train(False)

"""One optimizer step of :class:`~spear_lightning.training.module.SpearModule`, through the Trainer, as in a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import Trainer

from spear_lightning.algorithm import PPOClip
from spear_lightning.data.minibatches import IterationStream, Minibatch, StepPlan, build_minibatches
from spear_lightning.data.samples import Sample
from spear_lightning.policy.packing import Layout
from spear_lightning.policy.policy import Policy
from spear_lightning.training.module import SpearModule

TOKENIZER = str(Path(__file__).resolve().parents[2] / "spear_lightning/policy/embedded")

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 19200,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""A Qwen2 of 27.9 M parameters."""

QUICK = {**MODEL, "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
"""One of 0.6 M, to try the benchmark out."""

LEARNING_RATE = 1e-6


class OurUpdate:
    """Forward passes, backward passes, clipping and AdamW step on rows; called for each step.

    Args:
        rows: of a rollout.
        layout: ``policy.layout``.
        max_tokens: ``data.max_tokens``.
        model: Hugging Face configuration.
        accelerator: ``trainer.accelerator``.
        precision: ``trainer.precision``.
    """

    def __init__(
        self,
        rows: Mapping[str, Sample],
        layout: Layout,
        max_tokens: int,
        model: dict[str, Any],
        accelerator: str = "cpu",
        precision: Any = "32-true",
    ) -> None:
        self.policy = Policy(config=model, tokenizer=TOKENIZER, layout=layout)
        self.module = SpearModule(
            self.policy,
            loss=PPOClip(),
            aggregation="token-mean",
            optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE),
            max_response_length=1,
        )
        self.minibatch: Minibatch = build_minibatches(
            rows,
            {},
            plan=StepPlan(),
            max_tokens=max_tokens,
            pad_id=0,
            temperature=1.0,
            seed=1,
            iteration=0,
            layout=layout,
        )[0]
        self._trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # One step through the Trainer attaches module and optimizer to it; later ones are called as by its loop.
        self._trainer.fit_loop.max_epochs = 1
        self._trainer.fit(self.module, train_dataloaders=IterationStream(lambda: iter([self.minibatch]), 1))
        self._device = self._trainer.strategy.root_device
        if self._device.type != "cpu":  # where the Trainer has taken everything from at its end
            self.module.to(self._device)
            self.minibatch = self.minibatch.to(self._device)
            for optimizer in self._trainer.optimizers:
                _optimizer_to_device(optimizer, self._device)

    def __call__(self) -> None:
        """Take a step, to its end."""
        self.module.training_step(self.minibatch, 0)
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)

    @property
    def computed(self) -> int:
        """Tokens that go through the layers in a step."""
        seen: list[int] = []
        layer = self.policy.causal_lm.base_model.layers[0].mlp
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
        with torch.no_grad():
            for batch in self.minibatch.micro_batches["fresh"]:
                self.policy(batch.input_ids, batch.attention_mask, loss_mask=batch.response_mask)
        hook.remove()
        return sum(seen)

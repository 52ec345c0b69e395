"""One optimizer step of TRL's ``GRPOTrainer`` on given rows.

TRL is no dependency of this package. It goes into a folder of its own, beside the packages that are installed::

    pip install --no-deps --target FOLDER trl datasets dill multiprocess pandas python-dateutil six xxhash
    PYTHONPATH=FOLDER python benchmarks/training.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from measuring.our_update import LEARNING_RATE
from spear_lightning.data.samples import Sample

MISSING = "TRL is not installed: see the head of benchmarks/measuring/trl_update.py for the two lines it takes"


def installed() -> bool:
    """Whether TRL and what it needs can be imported."""
    return find_spec("trl") is not None and find_spec("datasets") is not None


class TRLUpdate:
    """Called for each step: its own loss on its own batches, its clipping, AdamW.

    TRL's loop around it (data loading, logging, callbacks) is left out, which is to its advantage. The rows come in
    through its ``rollout_func``, observations masked as its environments do it, and are padded, shuffled and cut by its
    code.

    Args:
        rows: of a rollout, in ``conversation`` context.
        tokenizer: of the model.
        config: Hugging Face configuration of the model.
        batch: rows of a micro-batch; TRL's default is 8.

    Raises:
        ValueError: the rows do not fill the micro-batches.
    """

    def __init__(
        self,
        rows: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase,
        config: dict[str, Any],
        batch: int = 8,
    ) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

        if len(rows) % batch:
            raise ValueError(f"{len(rows)} rows do not fill micro-batches of {batch}")
        self._pieces = len(rows) // batch
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa")
        self._folder = tempfile.TemporaryDirectory()
        rewards = [row.advantage for row in rows]
        arguments = GRPOConfig(
            output_dir=self._folder.name,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=self._pieces,
            num_generations=8,
            gradient_checkpointing=False,  # its default is true, for memory; without is sooner
            learning_rate=LEARNING_RATE,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        self.trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: rewards[: len(completions)],
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["task"] * len(rows)}),
            processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: _as_rollout(rows),
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = self._pieces
        self.trainer.model.train()
        torch.manual_seed(0)
        together = self.trainer._generate_and_score_completions([{"prompt": "task"}] * len(rows))
        self._batches = split_tensor_dict(shuffle_sequence_dict(together), self._pieces)

    def __call__(self) -> None:
        """Take a step."""
        trainer = self.trainer
        for batch in self._batches:
            loss = trainer.compute_loss(trainer.model, batch)
            trainer.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    @property
    def computed(self) -> int:
        """Tokens, padding among them, that go through the layers in a step."""
        return sum(batch["prompt_ids"].numel() + batch["completion_ids"].numel() for batch in self._batches)


def _as_rollout(rows: Sequence[Sample]) -> dict[str, list[Any]]:
    starts = [int(np.argmax(row.turns >= 0)) for row in rows]
    pairs = list(zip(rows, starts, strict=True))
    return {
        "prompt_ids": [row.ids[:start].tolist() for row, start in pairs],
        "completion_ids": [row.ids[start:].tolist() for row, start in pairs],
        "logprobs": [row.logps[start:].tolist() for row, start in pairs],
        "env_mask": [row.mask[start:].astype(int).tolist() for row, start in pairs],
    }

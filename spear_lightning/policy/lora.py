"""Low-rank adapters: train a small part of a model, its own weights frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: only they are trained (needs the ``lora`` extra).

    Args:
        rank: of the update of each adapted matrix.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the adapters' inputs, in training mode only. Above 0 the importance ratio is noisy already before
            the first update.
        target_modules: names of the linear layers to adapt, or ``"all-linear"`` (all but the output head).

    Raises:
        ValueError: a value is out of range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"policy.lora.rank must be at least 1, not {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"policy.lora.alpha must be above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"policy.lora.dropout must be in [0, 1), not {self.dropout}")


def with_adapters(causal: PreTrainedModel, lora: LoRA, seed: int) -> nn.Module:
    """A model with low-rank adapters, its own weights frozen.

    Args:
        causal: the model; changed in place.
        lora: settings of the adapters.
        seed: of their weights.

    Raises:
        ValueError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("policy.lora needs the peft package: pip install 'spear-lightning[lora]'") from error
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    alpha: Any = lora.alpha  # declared int there, used as a factor
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted: nn.Module = get_peft_model(causal, settings)
            return adapted
    except ValueError as error:
        raise ValueError(f"policy.lora.target_modules: {error}") from error

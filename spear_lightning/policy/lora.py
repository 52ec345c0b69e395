"""Low-rank adapters: train a small part of a model, its own weights frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import nn
from transformers import PreTrainedModel

from spear_lightning.utils.ranges import Above0, Positive, in_range


@in_range
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

    rank: Positive = 16
    alpha: Above0 = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: list[str] | str = "all-linear"


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
    alpha: Any = lora.alpha  # declared int there, used as a factor
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(causal, settings)
    except ValueError as error:
        raise ValueError(f"policy.lora.target_modules: {error}") from error

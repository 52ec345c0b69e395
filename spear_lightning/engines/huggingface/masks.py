"""Attention masks for a cache in which the column of a token is its position."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spear_lightning.policy.policy import Policy


class AttentionMasks:
    """Which columns a token attends to, by type of layer, where columns are positions.

    Args:
        config: Hugging Face configuration of the language model.

    Raises:
        ValueError: the model has layers that keep something other than keys and values.
    """

    def __init__(self, config: Any) -> None:
        types = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        chunk = getattr(config, "attention_chunk_size", None)
        if types is None:
            types = ["sliding_attention" if window else "full_attention"]
            self._single = True
        else:
            self._single = set(types) == {"full_attention"}
        self._limits: dict[str, tuple[str, int]] = {}
        self._values = torch.zeros(()), torch.tensor(torch.finfo(torch.float32).min)
        known = {
            "full_attention": ("full", 0),
            "sliding_attention": ("window", window or 0),
            "chunked_attention": ("chunk", chunk or 0),
        }
        for name in sorted(set(types)):
            if name not in known:
                raise ValueError(
                    f"HuggingFaceEngine cannot keep a cache for the model's {name} layers; use another model or engine"
                )
            self._limits[name] = known[name]

    def __call__(self, columns: Tensor, width: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The model's ``attention_mask``.

        Args:
            columns: of the tokens that attend, ``(batch, tokens)``.
            width: number of columns attended to.
            dtype: of the scores.

        Returns:
            What is added to the scores, ``(batch, 1, tokens, width)``, or one for each type of layer where there are
            several. (A boolean mask would be made into this one anew in each layer, at half the speed on a CPU.)
        """
        keys = torch.arange(width, device=columns.device)
        queries = columns[:, None, :, None]
        masks = {}
        for name, (kind, limit) in self._limits.items():
            mask = keys <= queries
            if kind == "window":
                mask &= keys > queries - limit
            elif kind == "chunk":
                mask &= keys // limit == queries // limit
            masks[name] = torch.where(mask, *self._added(dtype, mask.device))
        return next(iter(masks.values())) if self._single else masks

    def _added(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """To the score of a token that is attended to, and of one that is not."""
        if self._values[0].dtype != dtype or self._values[0].device != device:
            zero = torch.zeros((), dtype=dtype, device=device)
            self._values = zero, torch.full_like(zero, torch.finfo(dtype).min)
        return self._values


def masks_of(policy: Policy) -> AttentionMasks:
    """The masks of the policy's model.

    Raises:
        ValueError: the model keeps something other than keys and values by position (recurrent models, ALiBi).
    """
    model = policy.causal_lm
    accepted = inspect.signature(type(model.base_model).forward).parameters
    config = model.config.get_text_config()
    if (
        not {"position_ids", "past_key_values"} <= set(accepted)
        or getattr(model, "_is_stateful", False)
        or getattr(config, "alibi", False)
    ):
        raise ValueError(
            f"HuggingFaceEngine cannot play {type(model).__name__}: it needs a model with an ordinary key-value cache "
            "and position ids; use another model or engine"
        )
    return AttentionMasks(config)

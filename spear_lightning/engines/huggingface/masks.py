"""Attention masks for a cache in which the column of a token is its position."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

_LIMITS = {"full_attention": "", "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Types of layers, and where a model's configuration has their limit."""


class AttentionMasks:
    """Which columns a token attends to, by type of layer, where columns are positions.

    Args:
        model: a Hugging Face language model.

    Raises:
        ValueError: the model keeps something other than keys and values by position (recurrent models, ALiBi).
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        if (
            not {"position_ids", "past_key_values"} <= set(inspect.signature(type(model.base_model).forward).parameters)
            or getattr(model, "_is_stateful", False)
            or getattr(config, "alibi", False)
        ):
            raise ValueError(
                f"HuggingFaceEngine cannot play {type(model).__name__}: it needs a model with an ordinary key-value "
                "cache and position ids; use another model or engine"
            )
        types = set(getattr(config, "layer_types", None) or ())
        self._single = not types or types == {"full_attention"}
        if not types:
            types = {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}
        if unknown := sorted(types - set(_LIMITS)):
            raise ValueError(
                f"HuggingFaceEngine cannot cache {unknown[0]} layers, which the model has; use another model or engine"
            )
        self._limits = {name: getattr(config, _LIMITS[name], None) or 0 for name in sorted(types)}

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
        for name, limit in self._limits.items():
            mask = keys <= queries
            if name == "sliding_attention":
                mask &= keys > queries - limit
            elif name == "chunked_attention":
                mask &= keys // limit == queries // limit
            masks[name] = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
        return next(iter(masks.values())) if self._single else masks

"""The forward pass of models of Llama's architecture over a cache, written out.

Generating with a small model, most of the time goes into calling many small operations. The models' own code is made
for every use; this one generates only, and needs about half as many. It uses the model's own modules and weights:
adapters stay at work, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor, nn

from spear_lightning.engines.key_values import KeyValueRows
from spear_lightning.policy import Policy

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer consists of; looked up once, because it is called for every token."""

    norm: _Map
    query: _Map
    key: _Map
    value: _Map
    query_norm: _Map | None
    key_norm: _Map | None
    output: _Map
    feed_norm: _Map
    gate: _Map
    up: _Map
    act: _Map
    down: _Map
    size: int
    scale: float

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        separate = hasattr(attention, "q_norm")
        return cls(
            norm=_norm(layer.input_layernorm),
            query=_linear(attention.q_proj),
            key=_linear(attention.k_proj),
            value=_linear(attention.v_proj),
            query_norm=_norm(attention.q_norm) if separate else None,
            key_norm=_norm(attention.k_norm) if separate else None,
            output=_linear(attention.o_proj),
            feed_norm=_norm(layer.post_attention_layernorm),
            gate=_linear(mlp.gate_proj),
            up=_linear(mlp.up_proj),
            act=mlp.act_fn,
            down=_linear(mlp.down_proj),
            size=attention.head_dim,
            scale=attention.scaling,
        )


class LlamaForward:
    """Hidden states of a model of Llama's architecture (Llama, Mistral, Qwen2, Qwen3).

    Args:
        model: the ``PreTrainedModel`` without its head; :meth:`fits` says whether it is one. Its parameters are
            referred to: they may change, but not be replaced.
    """

    def __init__(self, model: Any) -> None:
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, _norm(model.norm)
        self._layers = [_Layer.of(layer) for layer in model.layers]

    @staticmethod
    def fits(policy: Policy) -> bool:
        """Whether the policy's model is of that architecture, as Hugging Face writes it, and without hooks."""
        causal = policy.causal_lm
        model = causal.base_model
        layers = getattr(model, "layers", None)
        if not policy.chunked or not layers or getattr(causal.config, "_attn_implementation", "") == "eager":
            return False
        kinds = {type(layer) for layer in layers}
        known = all(kind.__name__ in _LAYERS and kind.__module__.startswith("transformers.models.") for kind in kinds)
        full = set(getattr(causal.config.get_text_config(), "layer_types", None) or ["full_attention"])
        norms = (module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
        plain = all(type(norm).__module__.startswith("transformers.models.") for norm in norms)
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        return known and full == {"full_attention"} and plain and not hooked

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KeyValueRows) -> Tensor:
        """Hidden states after the last norm, ``(rows, tokens, width)``.

        Args:
            ids: what is new in each row, ``(rows, tokens)``.
            positions: of the tokens, ``(rows, tokens)``.
            mask: added to the scores, ``(rows, 1, tokens, columns)``.
            cache: opened for these tokens.
        """
        hidden = self._embed(ids)
        cos, sin = (part.unsqueeze(2) for part in self._rotary(hidden, positions))
        for number, layer in enumerate(self._layers):
            hidden = hidden + _attention(number, layer, layer.norm(hidden), cos, sin, mask, cache)
            fed = layer.feed_norm(hidden)
            hidden = hidden + layer.down(layer.act(layer.gate(fed)).mul_(layer.up(fed)))
        return self._norm(hidden)


def _attention(
    number: int, layer: _Layer, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KeyValueRows
) -> Tensor:
    rows, tokens, _ = hidden.shape
    shape = (rows, tokens, -1, layer.size)
    query, key, value = layer.query(hidden).view(shape), layer.key(hidden).view(shape), layer.value(hidden).view(shape)
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    heads = query.shape[2]
    both = torch.cat([query, key], 2)  # rotated together
    one, other = both.chunk(2, -1)
    both = (both * cos + torch.cat([-other, one], -1) * sin).transpose(1, 2)
    keys, values = cache.update(both[:, heads:], value.transpose(1, 2), number)
    attended = _attend(both[:, :heads], keys, values, mask, layer.scale)
    return layer.output(attended.transpose(1, 2).reshape(rows, tokens, -1))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``(rows, heads, tokens, size)``."""
    groups = query.shape[1] // keys.shape[1]
    if query.shape[2] == 1:  # the heads of a group see the same keys: as tokens, they read them once
        together = query.reshape(len(query), keys.shape[1], groups, -1)
        return F.scaled_dot_product_attention(together, keys, values, attn_mask=mask, scale=scale).reshape(query.shape)
    if groups > 1 and not query.is_cpu:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        groups = 1
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=groups > 1)


def _linear(module: Any) -> _Map:
    """A plain layer without the way through its module; others (adapters) as they are."""
    return partial(F.linear, weight=module.weight, bias=module.bias) if type(module) is nn.Linear else module


def _norm(module: Any) -> _Map:
    # The shape is the input's: a policy whose weights are elsewhere for the moment (ZeRO-3) has empty ones.
    return lambda hidden: F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)

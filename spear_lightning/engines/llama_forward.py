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
from spear_lightning.engines.operations import LARGE_WEIGHT, attend, linear, needed_widths, rms_norm
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
        )


class LlamaForward:
    """Next-token logits of a model of Llama's architecture (Llama, Mistral, Qwen2, Qwen3).

    Args:
        policy: that :meth:`fits`. Its parameters are referred to: they may change, but not be replaced.
    """

    def __init__(self, policy: Policy) -> None:
        model, head = policy.causal_lm.base_model, policy.causal_lm.get_output_embeddings()
        self._embed, self._rotary, self._norm = model.embed_tokens, model.rotary_emb, _norm(model.norm)
        self._layers = [_Layer.of(layer) for layer in model.layers]
        first = model.layers[0].self_attn
        self._scale, self._heads = first.scaling, (model.config.num_attention_heads, model.config.num_key_value_heads)
        # A token is drawn from whole rows, which a small product had better give right away.
        product = linear if head.weight.numel() >= LARGE_WEIGHT else F.linear
        self._head = partial(product, weight=head.weight, bias=head.bias)

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

    def __call__(self, ids: Tensor, lasts: Tensor, positions: Tensor, mask: Tensor, cache: KeyValueRows) -> Tensor:
        """Logits after each row's last token, ``(rows, vocabulary)``.

        Args:
            ids: what is new in each row, ``(rows, tokens)``.
            lasts: index of each row's last token within ``ids``, ``(rows,)``.
            positions: of the tokens, ``(rows, tokens)``.
            mask: added to the scores, ``(rows, 1, tokens, columns)``.
            cache: opened for these tokens.
        """
        hidden = self._embed(ids)
        angles = self._angles(*self._rotary(hidden, positions))
        hidden, shape = hidden.flatten(0, 1), ids.shape
        widths = needed_widths(positions, mask.shape[-1])
        for number, layer in enumerate(self._layers):
            query, key, value = _heads(layer, layer.norm(hidden), angles, shape)
            keys, values = cache.update(key, value, number)
            attended = attend(query, keys, values, mask, widths).transpose(1, 2).reshape(len(hidden), -1)
            hidden = hidden + layer.output(attended)
            fed = layer.feed_norm(hidden)
            hidden = hidden + layer.down(layer.act(layer.gate(fed)).mul_(layer.up(fed)))
        rows, tokens = shape
        return self._head(self._norm(hidden[torch.arange(rows, device=lasts.device) * tokens + lasts]))

    def _angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What rotates the heads of queries and keys, both ``(rows, tokens, heads, size)``; queries are scaled with it.

        A head's halves are rotated into each other: the sine of the first has the other sign.
        """
        queries, keys = self._heads
        scales = cos.new_full((queries + keys, 1), self._scale)
        scales[queries:] = 1
        one, other = sin.chunk(2, -1)
        return cos.unsqueeze(2) * scales, torch.cat([-one, other], -1).unsqueeze(2) * scales


def _heads(
    layer: _Layer, hidden: Tensor, angles: tuple[Tensor, Tensor], shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each ``(rows, heads, tokens, size)``."""
    places = (*shape, -1, layer.size)
    query, key = layer.query(hidden).view(places), layer.key(hidden).view(places)
    if layer.query_norm is not None and layer.key_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    cos, sin = angles
    both = torch.cat([query, key], 2)  # rotated together
    both = torch.addcmul(both * cos, both.roll(layer.size // 2, -1), sin).transpose(1, 2)
    count = query.shape[2]
    return both[:, :count], both[:, count:], layer.value(hidden).view(places).transpose(1, 2)


def _linear(module: Any) -> _Map:
    """A plain layer without the way through its module; others (adapters) as they are."""
    return partial(linear, weight=module.weight, bias=module.bias) if type(module) is nn.Linear else module


def _norm(module: Any) -> _Map:
    # The shape is the input's: a policy whose weights are elsewhere for the moment (ZeRO-3) has empty ones.
    epsilon = torch.tensor(module.variance_epsilon, dtype=torch.float32)
    return lambda hidden: rms_norm(hidden, module.weight, epsilon)

"""The forward pass of models of Llama's architecture over a cache, with few operations.

Generating with a small model, most of the time goes into calling many small operations. The models' own code is made
for every use; this one generates only, and needs about half as many. It uses the model's own modules and weights:
adapters stay at work, and no more is copied than small weights
(:mod:`spear_lightning.engines.huggingface.ops`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor, nn

from spear_lightning.engines.huggingface.kv_cache import KeyValueRows
from spear_lightning.engines.huggingface.ops import (
    LARGE_WEIGHT,
    Attention,
    FusedLinear,
    RopeTable,
    linear,
    linear_of,
    rms_norm,
    rotate,
)
from spear_lightning.policy.policy import Policy

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

_Map = Callable[[Tensor], Tensor]


class _Layer:
    """The operations of a layer; looked up once, because they are called for every token."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.feed_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.inputs = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.query_norm: _Map | None = _norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm: _Map | None = _norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.output, self.down = linear_of(attention.o_proj), linear_of(mlp.down_proj)
        self.gated = FusedLinear(mlp.gate_proj, mlp.up_proj)
        self.act: _Map = F.silu if isinstance(mlp.act_fn, nn.SiLU) else mlp.act_fn


class LlamaForward:
    """Next-token logits of a model of Llama's architecture (Llama, Mistral, Qwen2, Qwen3).

    Args:
        policy: that :meth:`fits`. Its parameters are referred to: they may change, but not be replaced.
    """

    def __init__(self, policy: Policy) -> None:
        model, head = policy.causal_lm.base_model, policy.causal_lm.get_output_embeddings()
        self._embed, self._rope, self._norm = model.embed_tokens, RopeTable(model.rotary_emb), _norm(model.norm)
        self._layers = [_Layer(layer) for layer in model.layers]
        self._scale, self._size = model.layers[0].self_attn.scaling, model.layers[0].self_attn.head_dim
        self._heads, self._key_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        # A token is drawn from whole rows, which a small product had better give right away.
        product = linear if head.weight.numel() >= LARGE_WEIGHT else F.linear
        self._head = partial(product, weight=head.weight, bias=head.bias)

    def refresh(self) -> None:
        """Take over weights that are copied."""
        for layer in self._layers:
            layer.inputs.refresh()
            layer.gated.refresh()

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
            ids: new tokens of each row, ``(rows, tokens)``.
            lasts: index of each row's last token within ``ids``, ``(rows,)``.
            positions: of the tokens, ``(rows, tokens)``.
            mask: added to the scores, ``(rows, 1, tokens, columns)``.
            cache: opened for these tokens.
        """
        shape = ids.shape
        hidden = self._embed(ids.flatten())
        angles = self._rope(hidden, positions, mask.shape[-1])
        attend = Attention(mask, positions, self._key_heads, self._scale)
        for number, layer in enumerate(self._layers):
            inputs = layer.inputs.together(layer.norm(hidden)).view(*shape, -1, self._size)
            query, key, value = self._rotated(layer, inputs, *angles)
            keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), number)
            hidden = hidden + layer.output(attend(query, keys, values))
            fed = layer.feed_norm(hidden)
            gate, up = layer.gated.apart(fed)
            hidden = hidden + layer.down(layer.act(gate).mul_(up))
        rows, tokens = shape
        if tokens > 1:
            hidden = hidden[torch.arange(rows, device=lasts.device) * tokens + lasts]
        return self._head(self._norm(hidden))

    def _rotated(self, layer: _Layer, inputs: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, of ``inputs`` that has the heads of all three, ``(rows, tokens, heads, size)``."""
        heads, both = self._heads, self._heads + self._key_heads
        turned = inputs[:, :, :both]
        if layer.query_norm is not None and layer.key_norm is not None:
            turned = torch.cat([layer.query_norm(turned[:, :, :heads]), layer.key_norm(turned[:, :, heads:])], 2)
        turned = rotate(turned, cos, sin)
        return turned[:, :, :heads], turned[:, :, heads:], inputs[:, :, both:]


def _norm(module: Any) -> _Map:
    # The shape is the input's: a policy whose weights are elsewhere for the moment (ZeRO-3) has empty ones.
    epsilon = torch.tensor(module.variance_epsilon, dtype=torch.float32)
    return lambda hidden: rms_norm(hidden, module.weight, epsilon)

"""Attention over rows laid end to end (:mod:`~spear_lightning.policy.packing`), for Hugging Face models.

Without :class:`~spear_lightning.policy.packing.Segments` it is their ``sdpa``, masks included: a model that is set to
it generates and evaluates padded batches as ever.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows it by
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spear_lightning.policy.packing import Segments, pack_rows

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

_VARLEN_OPTIONS: frozenset[str] = (
    frozenset() if varlen_attn is None else frozenset(inspect.signature(varlen_attn).parameters)
)

NAME = "packed_sdpa"
"""What ``attn_implementation`` is set to."""


def pack_model(causal: Any, attention: str) -> None:
    """Set a causal language model to :func:`packed_attention`, in place, and try out that it heeds the segments.

    Args:
        causal: a ``PreTrainedModel``.
        attention: its attention implementation so far.

    Raises:
        ValueError: the model or its attention cannot do it.
    """
    if attention != "sdpa":
        raise ValueError(
            f"policy.layout: rows can be packed with policy.attention: sdpa only, not {attention} (on a GPU in 16 bits "
            "sdpa is flash attention); or set policy.layout to padded"
        )
    settings = causal.config.get_text_config()
    windowed = ["sliding_attention"] if getattr(settings, "sliding_window", None) else []
    other = set(getattr(settings, "layer_types", None) or windowed) - {"full_attention"}
    if other:
        raise ValueError(
            f"policy.layout: {type(causal).__name__} has layers that do not attend to all that came before "
            f"({', '.join(sorted(other))}): set policy.layout to padded"
        )
    causal.set_attn_implementation(NAME)
    # Weights that are not there (partitioned by ZeRO-3, on the meta device) cannot be tried out.
    if any(p.is_meta or hasattr(p, "ds_id") for p in causal.parameters()):
        return
    refused = f"policy.layout: {type(causal).__name__} does not run on packed rows: set policy.layout to padded"
    try:
        heeds = _heeds_segments(causal)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{refused} ({error})") from error
    if not heeds:
        raise ValueError(refused)


@torch.no_grad()
def _heeds_segments(causal: Any) -> bool:
    """Whether two packed rows give what each gives alone."""
    weight = causal.get_input_embeddings().weight
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 4, 3]], device=weight.device) % len(weight)
    packed = pack_rows(ids, torch.ones_like(ids, dtype=torch.bool), share=True)
    training = causal.training
    causal.eval()
    try:
        alone = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        together = causal.base_model(input_ids=packed.input_ids, use_cache=False, **packed.inputs).last_hidden_state
    finally:
        causal.train(training)
    error = (together[0][packed.places] - alone).abs().max()
    return bool(error <= (1e-4 if weight.dtype == torch.float32 else 0.05) * alone.abs().max())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as Hugging Face models call it.

    Args:
        module: the layer.
        query: ``(1, heads, tokens, width)``.
        key: ``(1, key heads, tokens, width)``.
        value: as ``key``.
        attention_mask: not looked at where there are segments.
        scaling: of the scores.
        dropout: on the weights.
        segments: which tokens attend to which; ``None`` is plain ``sdpa``.
        kwargs: of ``sdpa``.

    Returns:
        ``(1, tokens, heads, width)``, and ``None`` in place of the weights.
    """
    if segments is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output
    if segments.index is not None:
        key, value = key.index_select(2, segments.index), value.index_select(2, segments.index)
    if _has_kernel(query):
        return _with_kernel(query, key, value, segments, scaling), None
    # One call a row. Split, and not sliced: the gradient of a slice is as large as all rows together.
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v, mask in zip(
            torch.split(query, segments.queries, 2),
            torch.split(key, segments.keys, 2),
            torch.split(value, segments.keys, 2),
            (mask if mask is None else mask.to(query.dtype) for mask in segments.masks),
            strict=True,
        )
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's own flash attention takes rows of any length at once: on GPUs, in 16 bits."""
    return "window_size" in _VARLEN_OPTIONS and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _with_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"enable_gqa": groups > 1}
    if "enable_gqa" not in _VARLEN_OPTIONS:  # torch 2.11
        key, value, options = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), {}
    output = varlen_attn(
        query,
        key,
        value,
        segments.query_ends,
        segments.key_ends,
        max(segments.queries),
        max(segments.keys),
        scale=scaling,
        window_size=(-1, 0),  # causal, aligned at the last key
        **options,
    )
    assert isinstance(output, Tensor)
    return output[None]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""Compilation and fused kernels: the same results in less time."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from spear_lightning.policy.packing import Layout


def compiled_base(causal: Any, layout: Layout) -> Callable[..., Any]:
    """The model below the output head, compiled for batches of any shape at its first call.

    Parameters, their names and hooks stay those of ``causal``.

    Raises:
        ValueError: the layout is not ``padded``: every batch would be compiled anew.
    """
    if layout != "padded":
        raise ValueError(
            f"policy.compile: with policy.layout: {layout} every batch would be compiled anew; set policy.layout to "
            "padded, or policy.compile to false"
        )
    return torch.compile(causal.base_model, dynamic=True)


def fuse_kernels(causal: Any) -> None:
    """Put Liger's Triton kernels in the place of norms, rotary embeddings and activations, in place.

    The output head is left alone: its log-probabilities are computed in chunks here.

    Raises:
        ValueError: ``liger-kernel`` is not installed, there is no GPU, or it does not know the model.
    """
    if find_spec("liger_kernel") is None:
        raise ValueError(
            "policy.fused_kernels needs the package liger-kernel: pip install 'spear-lightning[kernels]', "
            "or set it to false"
        )
    if not torch.cuda.is_available():
        raise ValueError("policy.fused_kernels needs a GPU, and torch sees none: set it to false")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    kind = causal.config.get_text_config().model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"policy.fused_kernels: liger-kernel has none for {kind}: set it to false")
    _apply_liger_kernel_to_instance(causal, cross_entropy=False, fused_linear_cross_entropy=False)

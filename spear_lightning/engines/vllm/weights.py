"""The policy's weights under the names of a checkpoint, as vLLM's models load them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from spear_lightning.engines.vllm.buckets import Weight
from spear_lightning.policy.policy import Policy


class PolicyWeights:
    """All weights of a policy as it is now, adapters added in; tied weights once.

    Nothing is copied until a tensor is asked for, one at a time, except where Transformers keeps weights in another
    form than checkpoints do (joined experts).

    Args:
        policy: whose weights are whole on this rank.
        dtype: name of the type to send floating-point weights in; ``None`` leaves them.
    """

    def __init__(self, policy: Policy, dtype: str | None = None) -> None:
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        model = policy.causal_lm
        self._adapted: dict[str, Any] = {
            f"{name}.weight": module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
        }
        own = {
            name.replace(".base_layer.", "."): parameter.detach()
            for name, parameter in model.named_parameters()
            if ".lora_" not in name
        }
        # The identity where Transformers stores weights as checkpoints do.
        self._tensors: dict[str, Tensor] = revert_weight_conversion(model, own)

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, on the policy's device."""
        for name, tensor in self._tensors.items():
            if name in self._adapted:
                module = self._adapted[name]
                tensor = tensor + sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            yield name, tensor.to(self._dtype_of(tensor))

    def describe(self) -> list[Weight]:
        """Name, type and shape of each tensor, in the order of :meth:`__iter__`."""
        return [
            Weight(name, str(self._dtype_of(tensor)).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        ]

    def _dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if self._dtype and tensor.is_floating_point() else tensor.dtype

"""A policy's weights as they were after some update, to play with while the policy itself is trained."""

from __future__ import annotations

import copy
from typing import Any

import torch

from spear_lightning.policy.policy import Policy


class WeightSnapshot:
    """A second policy that is given the weights of the first when asked to.

    Frozen weights (those beneath adapters) are shared: they never change. The others cost as much memory again.

    Args:
        policy: to follow. A strategy may put hooks into its modules later: they are copied as they are now.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        memo: dict[int, Any] = {
            id(parameter): torch.nn.Parameter(parameter.data.new_empty(0), requires_grad=False)
            if parameter.requires_grad
            else parameter
            for parameter in policy.parameters()
        }
        self._copy = copy.deepcopy(policy, memo).eval()

    @torch.no_grad()
    def take(self) -> Policy:
        """The copy, with the weights as they are now. Nothing may be generating with it any more."""
        device = next(self._policy.parameters()).device
        for (name, source), (other, target) in zip(
            self._policy.named_parameters(), self._copy.named_parameters(), strict=True
        ):
            assert name == other
            if target is source:
                continue
            if target.shape == source.shape and target.device == device and target.dtype == source.dtype:
                target.copy_(source)
            else:
                target.data = source.detach().clone()
        for source_buffer, target_buffer in zip(self._policy.buffers(), self._copy.buffers(), strict=True):
            target_buffer.data = source_buffer.detach().clone()
        return self._copy

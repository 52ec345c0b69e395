"""A copy of a policy to generate with, while the policy itself is trained or partitioned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from spear_lightning.policy.policy import Policy


class WeightSnapshot:
    """A copy of a policy, whose weights are updated on request.

    Args:
        policy: to follow. A strategy may put hooks into its modules later: they are copied as they are now.
        gather: makes a partitioned parameter whole for the time of its copying. Without it frozen weights (those
            beneath adapters) are shared: they never change. The others cost as much memory again.
    """

    def __init__(
        self, policy: Policy, gather: Callable[[torch.nn.Parameter], AbstractContextManager[Any]] | None = None
    ) -> None:
        self._policy, self._gather = policy, gather or nullcontext
        memo: dict[int, Any] = {
            id(parameter): torch.nn.Parameter(parameter.data.new_empty(0), requires_grad=False)
            if parameter.requires_grad or gather
            else parameter
            for parameter in policy.parameters()
        }
        self._copy = copy.deepcopy(policy, memo).eval()  # tied parameters stay tied

    @torch.no_grad()
    def take(self) -> Policy:
        """The copy, with the weights as they are now. No generation with it may be running."""
        pairs = zip(self._policy.named_parameters(), self._copy.named_parameters(), strict=True)
        for (name, source), (other, target) in pairs:
            assert name == other
            if target is source:
                continue
            with self._gather(source):  # one at a time: never two full copies
                if (target.shape, target.device, target.dtype) == (source.shape, source.device, source.dtype):
                    target.copy_(source)
                else:
                    target.data = source.detach().clone()
        for source_buffer, target_buffer in zip(self._policy.buffers(), self._copy.buffers(), strict=True):
            target_buffer.data = source_buffer.detach().clone()
        return self._copy

    def release(self) -> None:
        """Free the copy's weights until the next :meth:`take`."""
        for parameter in self._copy.parameters():
            parameter.data = parameter.data.new_empty(0)

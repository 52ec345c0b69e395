"""The state a policy generates in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from spear_lightning.policy.policy import Policy


@contextmanager
def generation_mode(policy: Policy) -> Iterator[None]:
    """Evaluation mode, no gradients, and an attention implementation that takes any mask; all as before at the end."""
    model: Any = policy.causal_lm
    implementation = model.config._attn_implementation
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        if implementation not in ("sdpa", "eager"):  # flash attention takes no masks of its callers
            model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            yield
    finally:
        if implementation not in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training

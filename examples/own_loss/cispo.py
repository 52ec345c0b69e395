"""A loss of one's own: CISPO (arXiv 2506.13585), which clips the weight of a token and never its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spear_lightning.algorithm import PolicyLoss, TokenLoss, masked_mean


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """``−min(r, bound)·A·log π``, the weight detached: a token that the ratio clips still counts, with less.

    Args:
        bound: of the ratio; in PPO a token above it would get no gradient.

    Raises:
        ValueError: the bound is not positive.
    """

    bound: float = 1.28

    def __post_init__(self) -> None:
        if self.bound <= 0:
            raise ValueError(f"CISPO.bound must be above 0, not {self.bound}")

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        adv: Tensor,
        mask: Tensor,
        *,
        entropies: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenLoss:
        """See :class:`PolicyLoss`."""
        log_ratio = (logp.detach() - old_logp).clamp(-20, 20)
        ratio = log_ratio.exp()
        return TokenLoss(
            loss=-ratio.clamp(max=self.bound) * adv * logp,
            clip_fraction=masked_mean((ratio > self.bound).float(), mask),
            approx_kl=masked_mean(-log_ratio, mask),
        )

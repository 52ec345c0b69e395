"""Policy losses as small objects that a configuration names by class path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spear_lightning.algorithm.objectives import TokenLoss, clip_cov, kl_cov, ppo_clip

Covariance = Literal["batch", "state"]


class PolicyLoss(ABC):
    """Turns log-probabilities and advantages into a loss for each token.

    An abstract class and not a protocol: jsonargparse takes a protocol with ``__call__`` for a function type and would
    refuse these classes.
    """

    may_drop: ClassVar[bool] = False
    """Whether it singles out tokens by bounds that no token may meet; a run in which none does says so."""

    @abstractmethod
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
        """The loss of each token of a micro-batch.

        Args:
            logp: log-probabilities under the policy being trained, ``(batch, tokens)``, nats.
            old_logp: behaviour log-probabilities.
            adv: advantages.
            mask: 0/1; tokens outside take no part.
            entropies: of the policy at each token, nats, detached; losses that do not need them ignore them.
            generator: what random choices are drawn from; losses without any ignore it.
        """


@dataclass(frozen=True)
class PPOClip(PolicyLoss):
    """Clip-higher PPO with a dual clip (:func:`~spear_lightning.algorithm.objectives.ppo_clip`).

    Args:
        clip_low: ε_low, in (0, 1].
        clip_high: ε_high, above 0.
        dual_clip: c, above 1; ``None`` turns the dual clip off.

    Raises:
        ValueError: a value out of range; names the key.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0

    def __post_init__(self) -> None:
        _check_clip("PPOClip", self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            _check("PPOClip.dual_clip", self.dual_clip, self.dual_clip > 1, "above 1 (null turns it off)")

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
        return ppo_clip(
            logp,
            old_logp,
            adv,
            mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )


@dataclass(frozen=True)
class ClipCov(PolicyLoss):
    """Covariance clipping (:func:`~spear_lightning.algorithm.objectives.clip_cov`).

    Args:
        ratio: λ, share of the tokens that may be dropped, in (0, 1]. 1 drops all that are eligible.
        lower: lower bound of the covariance.
        upper: upper bound of the covariance.
        clip_low: ε_low, in (0, 1].
        clip_high: ε_high, above 0.
        covariance: over the ``batch``, as published, in units of the rewards; or state by ``state``, in nats at any
            scale of the rewards (:func:`~spear_lightning.algorithm.objectives.covariance`).

    Raises:
        ValueError: a value out of range; names the key.
    """

    may_drop: ClassVar[bool] = True

    ratio: float = 0.02
    lower: float = 1.0
    upper: float = 40.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    covariance: Covariance = "batch"

    def __post_init__(self) -> None:
        _check_clip("ClipCov", self.clip_low, self.clip_high)
        _check("ClipCov.ratio", self.ratio, 0 < self.ratio <= 1, "in (0, 1]")
        _check("ClipCov.lower", self.lower, self.lower < self.upper, f"below ClipCov.upper = {self.upper}")

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
        return clip_cov(
            logp,
            old_logp,
            adv,
            mask,
            ratio=self.ratio,
            lower=self.lower,
            upper=self.upper,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            entropies=entropies if self.covariance == "state" else None,
            generator=generator,
        )


@dataclass(frozen=True)
class KLCov(PolicyLoss):
    """KL penalty on the tokens of largest covariance (:func:`~spear_lightning.algorithm.objectives.kl_cov`).

    Args:
        ratio: k, share of the tokens that are penalised, in (0, 1].
        coef: weight of the penalty, not negative.
        covariance: as in :class:`ClipCov`.

    Raises:
        ValueError: a value out of range; names the key.
    """

    ratio: float = 0.02
    coef: float = 1.0
    covariance: Covariance = "batch"

    def __post_init__(self) -> None:
        _check("KLCov.ratio", self.ratio, 0 < self.ratio <= 1, "in (0, 1]")
        _check("KLCov.coef", self.coef, self.coef >= 0, "at least 0")

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
        return kl_cov(
            logp,
            old_logp,
            adv,
            mask,
            ratio=self.ratio,
            coef=self.coef,
            entropies=entropies if self.covariance == "state" else None,
        )


def _check_clip(owner: str, low: float, high: float) -> None:
    _check(f"{owner}.clip_low", low, 0 < low <= 1, "in (0, 1]")
    _check(f"{owner}.clip_high", high, high > 0, "above 0")


def _check(key: str, value: float, good: bool, must: str) -> None:
    if not good:
        raise ValueError(f"{key} must be {must}, not {value}")

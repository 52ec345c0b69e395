"""The policy objective (§2): losses of tokens, and the KL and importance terms beside them.

Pure functions over ``(batch, tokens)`` tensors, and the losses that a configuration names. ``r`` is the token's
probability ratio, ``A`` its advantage. Everything that is averaged is averaged over the tokens of the mask only; what a
masked-out token holds can change neither a loss nor a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Gt
from torch import Generator, Tensor
from typing_extensions import override

from spear_lightning.algorithm.aggregation import TINY, at_least_single, masked_mean
from spear_lightning.algorithm.aggregation import aggregate as aggregate
from spear_lightning.utils.ranges import Above0, AtLeast0, Share, in_range

Covariance = Literal["batch", "state"]
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class TokenLoss:
    """What a policy loss says about a micro-batch.

    Attributes:
        loss: loss of each token before masking and aggregation, ``(batch, tokens)``; carries the gradient.
        clip_fraction: share of the mask's tokens at which the ratio clip is active; detached scalar.
        approx_kl: mean of ``logπ_old − logπ`` over the mask; detached scalar, in nats.
        cov_fraction: share of the mask's tokens singled out for their covariance (dropped by Clip-Cov, penalised by
            KL-Cov); detached scalar, 0 for losses that look at no covariance.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    cov_fraction: Tensor = field(default_factory=lambda: torch.zeros(()))


# --- policy losses ----------------------------------------------------------------------------------------------------


class PolicyLoss(ABC):
    """Turns log-probabilities and advantages into a loss for each token; a configuration names it by class path.

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
        generator: Generator | None = None,
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


@in_range
@dataclass(frozen=True)
class PPOClip(PolicyLoss):
    """PPO with an asymmetric ("clip-higher") and a dual clip (§2).

    ``max(−A·r, −A·clip(r, 1−ε_low, 1+ε_high))``; where ``A < 0`` at most ``−A·c``, so that a token whose probability
    has grown many times over cannot dominate.

    Args:
        clip_low: ε_low, in (0, 1].
        clip_high: ε_high, above 0.
        dual_clip: c, above 1; ``None`` turns the dual clip off.
    """

    clip_low: Share = 0.2
    clip_high: Above0 = 0.28
    dual_clip: Annotated[float, Gt(1)] | None = 10.0

    @override
    def __call__(self, logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, **_: Any) -> TokenLoss:
        ratio = _Ratio.of(logp, old_logp, adv, mask)
        loss, clipped = ratio.clip(self.clip_low, self.clip_high)
        if self.dual_clip is not None:
            loss = torch.where(ratio.adv < 0, torch.minimum(loss, -ratio.adv * self.dual_clip), loss)
        return ratio.token_loss(loss, clipped, torch.zeros_like(clipped))


@in_range
@dataclass(frozen=True)
class ClipCov(PolicyLoss):
    """Clip-Cov: PPO in which a few random tokens of high covariance carry no gradient (§2).

    Tokens that reinforce what is already likely have a large :func:`covariance`, and are what makes the entropy fall.
    Among those with ``lower < cov_i < upper`` that the ratio has not already clipped, ``max(1, ⌊λN⌋)`` of the ``N``
    tokens of the mask are drawn uniformly; their loss is zero.

    The means and the draw are over the tokens given, i.e. the micro-batch: the one place where the cut into
    micro-batches matters.

    Args:
        ratio: λ, share of the tokens that may be dropped, in (0, 1]. 1 drops all that are eligible, and draws nothing.
        lower: lower bound of the covariance, exclusive; in advantage × nats, state by state in nats.
        upper: upper bound of the covariance, exclusive.
        clip_low: ε_low, in (0, 1].
        clip_high: ε_high, above 0.
        covariance: over the ``batch``, as published, in units of the rewards; or state by ``state``, in nats at any
            scale of the rewards (:func:`covariance`).

    Raises:
        ValueError: a number is out of range, or ``lower`` is not below ``upper``.
    """

    may_drop: ClassVar[bool] = True

    ratio: Share = 0.02
    lower: float = 1.0
    upper: float = 40.0
    clip_low: Share = 0.2
    clip_high: Above0 = 0.28
    covariance: Covariance = "batch"

    def __post_init__(self) -> None:
        if self.lower >= self.upper:
            raise ValueError(f"ClipCov.lower must be below ClipCov.upper = {self.upper}, not {self.lower}")

    @override
    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        adv: Tensor,
        mask: Tensor,
        *,
        entropies: Tensor | None = None,
        generator: Generator | None = None,
    ) -> TokenLoss:
        ratio = _Ratio.of(logp, old_logp, adv, mask)
        loss, clipped = ratio.clip(self.clip_low, self.clip_high)
        with torch.no_grad():
            cov = covariance(ratio.logp, ratio.adv, mask, entropies if self.covariance == "state" else None)
            eligible = ratio.inside & ~clipped & (cov > self.lower) & (cov < self.upper)
            candidates = eligible.flatten().nonzero().squeeze(-1)
            quota = max(1, int(self.ratio * int(ratio.inside.sum())))
            if quota < len(candidates):
                device = generator.device if generator is not None else "cpu"
                order = torch.randperm(len(candidates), generator=generator, device=device)
                candidates = candidates[order[:quota].to(candidates.device)]
            dropped = ratio.flags_at(candidates)
        return ratio.token_loss(loss.masked_fill(dropped, 0.0), clipped, dropped)


@in_range
@dataclass(frozen=True)
class KLCov(PolicyLoss):
    """KL-Cov: the unclipped policy gradient, with a KL penalty on the tokens of largest covariance (§2).

    ``−A·r``, plus ``coef·|log r|`` at the ``max(1, ⌊kN⌋)`` tokens with the largest :func:`covariance`. Ties go to the
    earlier token. ``clip_fraction`` is 0.

    Args:
        ratio: k, share of the tokens that are penalised, in (0, 1].
        coef: weight of the penalty, not negative.
        covariance: as in :class:`ClipCov`.
    """

    ratio: Share = 0.02
    coef: AtLeast0 = 1.0
    covariance: Covariance = "batch"

    @override
    def __call__(
        self, logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, *, entropies: Tensor | None = None, **_: Any
    ) -> TokenLoss:
        ratio = _Ratio.of(logp, old_logp, adv, mask)
        with torch.no_grad():
            positions = ratio.inside.flatten().nonzero().squeeze(-1)
            cov = covariance(ratio.logp, ratio.adv, mask, entropies if self.covariance == "state" else None)
            order = cov.flatten()[positions].argsort(descending=True, stable=True)
            penalised = ratio.flags_at(positions[order[: max(1, int(self.ratio * len(positions)))]])
        loss = -ratio.adv * ratio.r + torch.where(penalised, self.coef * ratio.log_r.abs(), 0.0)
        return ratio.token_loss(loss, torch.zeros_like(penalised), penalised)


def ppo_clip(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
) -> TokenLoss:
    """:class:`PPOClip` as a function."""
    return PPOClip(clip_low, clip_high, dual_clip)(logp, old_logp, adv, mask)


def clip_cov(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    mask: Tensor,
    *,
    ratio: float = 0.02,
    lower: float = 1.0,
    upper: float = 40.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    generator: Generator | None = None,
) -> TokenLoss:
    """:class:`ClipCov` over the batch as a function."""
    return ClipCov(ratio, lower, upper, clip_low, clip_high)(logp, old_logp, adv, mask, generator=generator)


def kl_cov(
    logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, *, ratio: float = 0.02, coef: float = 1.0
) -> TokenLoss:
    """:class:`KLCov` over the batch as a function."""
    return KLCov(ratio, coef)(logp, old_logp, adv, mask)


def covariance(logp: Tensor, adv: Tensor, mask: Tensor, entropies: Tensor | None = None) -> Tensor:
    """By how much each token, reinforced as its advantage says, lowers the entropy (Cui et al., arXiv 2505.22617).

    To first order a step of the policy gradient changes the entropy at a state by ``−η·E_a[(logπ − E logπ)·A]``.

    - Over the batch, as published: ``(A_i − mean A)(logπ_i − mean logπ)``, the means over the tokens of the mask for
      both expectations. It scales with the rewards, and is 0 wherever all advantages are equal, as those of replayed
      successes soon are.
    - State by state, with ``entropies``: ``(A_i / rms A)(logπ_i + H_i)``. An advantage is relative to what is expected
      already, and ``E logπ = −H`` is known exactly at each state. In nats, at any scale of the rewards: how much more
      likely than usual at its state the token is that an advantage of ordinary size reinforces.

    Args:
        logp: log-probabilities under the policy being trained, ``(batch, tokens)``, nats.
        adv: advantages.
        mask: 0/1.
        entropies: of the policy at each token, nats; ``None`` for the form over the batch.

    Returns:
        ``(batch, tokens)``, detached; meaningless outside the mask.
    """
    inside = mask != 0
    tokens = inside.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(inside, x, 0.0).sum() / tokens

    with torch.no_grad():
        if entropies is None:
            return (adv - mean(adv)) * (logp - mean(logp))
        scale = mean(adv.square()).sqrt().clamp(min=TINY)
        return adv / scale * (logp + _harmless(at_least_single(entropies), mask))


class _Ratio(NamedTuple):
    """What every policy loss starts from; each ``(batch, tokens)``."""

    inside: Tensor
    logp: Tensor
    adv: Tensor
    log_r: Tensor
    r: Tensor

    @classmethod
    def of(cls, logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor) -> _Ratio:
        logp, old_logp, adv = (_harmless(at_least_single(x), mask) for x in (logp, old_logp, adv))
        log_r = (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        return cls(mask != 0, logp, adv, log_r, log_r.exp())

    def clip(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The clipped PPO loss of each token, and where the clip is what decides it."""
        plain = -self.adv * self.r
        clipped = -self.adv * self.r.clamp(1 - low, 1 + high)
        return torch.maximum(plain, clipped), (clipped > plain).detach()

    def flags_at(self, positions: Tensor) -> Tensor:
        """``(batch, tokens)``, true at these positions of the flattened form."""
        return torch.zeros_like(self.inside).flatten().index_fill(0, positions, True).view_as(self.inside)

    def token_loss(self, loss: Tensor, clipped: Tensor, singled_out: Tensor) -> TokenLoss:
        """``loss`` with its diagnostics, given the tokens that were clipped, and singled out for their covariance."""
        clip_fraction, cov_fraction = (masked_mean(x.to(loss.dtype), self.inside) for x in (clipped, singled_out))
        return TokenLoss(loss, clip_fraction, masked_mean(-self.log_r.detach(), self.inside), cov_fraction)


def _harmless(x: Tensor, mask: Tensor) -> Tensor:
    """Replace infinities and NaN outside the mask: 0·NaN would otherwise reach the gradient."""
    return torch.where((mask != 0) | x.isfinite(), x, 0.0)


# --- beside the policy loss -------------------------------------------------------------------------------------------


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π‖π_ref) per token, ``exp(d) − d − 1`` with ``d = logπ_ref − logπ`` clamped to ±20.

    Args:
        logp: log-probabilities under the policy being trained, ``(batch, tokens)``, nats.
        ref_logp: the same under the frozen reference policy.

    Returns:
        ``(batch, tokens)``, not negative; carries the gradient of ``logp``.
    """
    d = (at_least_single(ref_logp) - at_least_single(logp)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


def truncated_importance_weights(
    old_logp: Tensor,
    rollout_logp: Tensor,
    cap: float = 2.0,
    mode: Literal["token", "sequence"] = "token",
    mask: Tensor | None = None,
) -> Tensor:
    """Weights that correct for an engine whose probabilities are not quite the trainer's (§2).

    - ``token``: ``min(exp(logπ_train_old − logπ_rollout), C)`` for each token.
    - ``sequence``: 1 for all tokens of a sequence whose geometric mean ratio lies within ``[1/C, C]``, else 0.

    Args:
        old_logp: log-probabilities of the behaviour policy as the trainer computes them, ``(batch, tokens)``, nats.
        rollout_logp: the same as the engine reported them.
        cap: C, at least 1.
        mode: see above.
        mask: 0/1; the tokens that the mean of ``sequence`` is over. ``None`` for all.

    Returns:
        ``(batch, tokens)``, detached; to be multiplied with the loss of each token.

    Raises:
        ValueError: ``cap`` below 1, or unknown ``mode``.
    """
    if cap < 1:
        raise ValueError(f"importance weight cap must be at least 1, not {cap}")
    if mode not in ("token", "sequence"):
        raise ValueError(f"unknown importance weight mode {mode!r}: use one of token, sequence")
    mask = torch.ones_like(old_logp) if mask is None else mask
    with torch.no_grad():
        old, rollout = (_harmless(at_least_single(x), mask) for x in (old_logp, rollout_logp))
        log_r = (old - rollout).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        if mode == "token":
            return log_r.exp().clamp(max=cap)
        inside = mask != 0
        mean = torch.where(inside, log_r, 0.0).sum(-1, keepdim=True) / (inside.sum(-1, keepdim=True) + TINY)
        within = mean.exp().clamp(1 / cap, cap) == mean.exp()
        return within.to(log_r.dtype).expand_as(log_r)

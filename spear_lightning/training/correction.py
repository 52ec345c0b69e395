"""Where old log-probabilities come from, and what is done about rollouts by an engine that computes them differently.

The in-process engine's log-probabilities equal the trainer's to rounding. Another engine's may not (vLLM in bfloat16
differs by hundredths): then they are recomputed by the trainer, once an iteration, before its samples enter the replay
buffer and before its first update, and the remaining mismatch is corrected by truncated importance weights
(algorithm.md §2). Replayed samples keep both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spear_lightning.algorithm import truncated_importance_weights
from spear_lightning.data.micro_batches import MicroBatch, as_many_as_other_ranks, micro_batch_of, plan
from spear_lightning.data.samples import Sample
from spear_lightning.metrics.store import MetricStore
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.ranges import Above0, in_range

_Floats = npt.NDArray[np.float32]


@in_range
@dataclass(frozen=True)
class RolloutCorrection:
    """Old log-probabilities of fresh samples.

    Args:
        recompute: compute them with the trainer's own weights before an iteration's first update, instead of taking
            those of the engine.
        cap: C, the largest importance weight ``exp(logπ_trainer − logπ_engine)``; ``None`` weighs nothing.
        level: weigh each ``token``, or take out each ``sequence`` whose weight exceeds C.

    Raises:
        ValueError: a weight is asked for without recomputing.
    """

    recompute: bool = False
    cap: Above0 | None = None
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if self.cap is not None and not self.recompute:
            raise ValueError(
                "model.correction.cap needs model.correction.recompute: true (the weight compares the trainer's "
                "log-probabilities with the engine's)"
            )

    @torch.no_grad()
    def apply(
        self,
        samples: Mapping[str, Sample],
        policy: Policy,
        device: torch.device,
        metrics: MetricStore,
        *,
        pad_id: int,
        max_tokens: int,
        temperature: float,
    ) -> dict[str, Sample]:
        """The samples with corrected log-probabilities and weights at the tokens of their masks.

        They are as they were where nothing is recomputed. Every rank must call it.

        Args:
            samples: of one iteration, by key, as the engine told them.
            policy: with the weights from before the first update.
            device: of the policy.
            metrics: receives ``rollout/logp_mismatch``: mean and ``_max`` of the magnitude of Δ logπ.
            pad_id: token id that short samples are filled up with.
            max_tokens: that are computed in one pass at most (:func:`~spear_lightning.data.micro_batches.plan`).
            temperature: that they were drawn at.
        """
        if not self.recompute:
            return dict(samples)
        keys = sorted(samples)
        parts = plan([samples[key] for key in keys], max_tokens, policy.layout)
        mine = [micro_batch_of([samples[keys[number]] for number in part], pad_id, "fresh") for part in parts]
        batches = as_many_as_other_ranks(mine, pad_id, "fresh")
        found = [self._recompute(batch.to(device), policy, temperature, metrics) for batch in batches]
        return {
            keys[number]: _with_numbers(samples[keys[number]], *numbers)
            for part, many in zip(parts, found[: len(parts)], strict=True)
            for number, numbers in zip(part, many, strict=True)
        }

    def _recompute(
        self, batch: MicroBatch, policy: Policy, temperature: float, metrics: MetricStore
    ) -> list[tuple[_Floats, _Floats | None]]:
        """Log-probabilities and weights of each sample, as long as the longest."""
        mask = batch.response_mask
        logps = policy(batch.input_ids, batch.attention_mask, temperature, loss_mask=mask > 0).logps
        mismatch = ((logps - batch.old_logps) * mask).abs()
        metrics.mean("rollout/logp_mismatch", mismatch.sum() / mask.sum().clamp(min=1), mask.sum())
        metrics.max("rollout/logp_mismatch_max", mismatch.max())
        if self.cap is None:
            return [(numbers, None) for numbers in _on_cpu(logps)]
        weights = truncated_importance_weights(logps, batch.old_logps, self.cap, self.level, mask)
        return list(zip(_on_cpu(logps), _on_cpu(weights), strict=True))


def _on_cpu(values: Tensor) -> _Floats:
    return values.float().cpu().numpy()


def _with_numbers(sample: Sample, logps: _Floats, weights: _Floats | None) -> Sample:
    """A sample with these numbers, which may go on beyond its end, at the tokens of its mask."""
    end = len(sample)
    return replace(
        sample,
        logps=np.where(sample.mask, logps[:end], sample.logps),
        weights=None if weights is None else np.where(sample.mask, weights[:end], np.float32(1)),
    )

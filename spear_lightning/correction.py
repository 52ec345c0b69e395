"""Where old log-probabilities come from, and what is done about rollouts by an engine that computes them differently.

The in-process engine's log-probabilities equal the trainer's to rounding. Another engine's may not (vLLM in bfloat16
differs by hundredths): then they are recomputed by the trainer before the first update, and the remaining mismatch is
corrected by truncated importance weights (algorithm.md §2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from spear_lightning.algorithm.objectives import truncated_importance_weights
from spear_lightning.metrics import MetricStore
from spear_lightning.policy import Policy
from spear_lightning.rollout.batching import MicroBatch
from spear_lightning.rollout.minibatches import Minibatch


@dataclass(frozen=True)
class RolloutCorrection:
    """Old log-probabilities of fresh rows.

    Args:
        recompute: compute them with the trainer's own weights before an iteration's first update, instead of taking
            those of the engine.
        cap: C, the largest importance weight ``exp(logπ_trainer − logπ_engine)``; ``None`` weighs nothing.
        level: weigh each ``token``, or take out each ``sequence`` whose weight exceeds C.

    Raises:
        ValueError: a weight is asked for without recomputing.
    """

    recompute: bool = False
    cap: float | None = None
    level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if self.cap is not None and not self.recompute:
            raise ValueError(
                "model.correction.cap needs model.correction.recompute: true (the weight compares the trainer's "
                "log-probabilities with the engine's)"
            )
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"model.correction.cap must be above 0, not {self.cap}")

    def apply(
        self, minibatches: list[Minibatch], policy: Policy, device: torch.device, metrics: MetricStore
    ) -> list[Minibatch]:
        """The minibatches with corrected fresh rows; unchanged where nothing is recomputed.

        Args:
            minibatches: of one iteration.
            policy: with the weights from before the first update.
            device: of the policy.
            metrics: receives ``rollout/logp_mismatch``: mean and ``_max`` of the magnitude of Δ logπ.
        """
        if not self.recompute:
            return minibatches
        return [
            Minibatch(
                replace(
                    minibatch.fresh,
                    micro_batches=[
                        self._correct(batch, policy, device, minibatch.temperature, metrics)
                        for batch in minibatch.fresh.micro_batches
                    ],
                ),
                minibatch.replay,
                minibatch.temperature,
                minibatch.seed,
            )
            for minibatch in minibatches
        ]

    @torch.no_grad()
    def _correct(
        self, batch: MicroBatch, policy: Policy, device: torch.device, temperature: float, metrics: MetricStore
    ) -> MicroBatch:
        batch = batch.to(device)
        mask = batch.response_mask
        logps = policy(batch.input_ids, batch.attention_mask, temperature, want=mask > 0).logps
        mismatch = ((logps - batch.old_logps) * mask).abs()
        metrics.mean("rollout/logp_mismatch", mismatch.sum() / mask.sum().clamp(min=1), mask.sum())
        metrics.max("rollout/logp_mismatch_max", mismatch.max())
        weights = None
        if self.cap is not None:
            weights = truncated_importance_weights(logps, batch.old_logps, self.cap, self.level, mask)
        return replace(batch, old_logps=logps, weights=weights)

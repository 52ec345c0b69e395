"""The LightningModule: a policy, its on-policy objective and the imitation of its own past successes.

One training step is one optimizer step on one minibatch::

    J = J_on-policy(fresh samples) + γ(t) · J_replay(replayed samples)

The minibatch comes cut into micro-batches that fit in memory. Each contributes its share of losses that are normalised
over the whole global minibatch, so the gradient does not depend on the cut or on the number of ranks. Optimization is
manual, because the number of micro-batches varies from step to step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from spear_lightning.algorithm import Aggregation, PolicyLoss, PPOClip, TokenLoss, aggregate_sum, k3_kl, normalizer
from spear_lightning.data.micro_batches import MicroBatch
from spear_lightning.data.minibatches import Minibatch, Source
from spear_lightning.data.samples import Sample
from spear_lightning.distributed.collectives import rank, total_over_ranks, world_size
from spear_lightning.distributed.zero import ZeroStrategy, check_strategy
from spear_lightning.environments.base import Split
from spear_lightning.metrics.rollout import record_rollout
from spear_lightning.metrics.store import MetricStore
from spear_lightning.policy.policy import Policy, Reference, TokenStats
from spear_lightning.rollout.episode import Rollout
from spear_lightning.training.correction import RolloutCorrection
from spear_lightning.training.hooks import MicroBatchOutput, RolloutHooks, update_listeners
from spear_lightning.training.learning_rate import LearningRateSchedule
from spear_lightning.training.watch import Watch
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import Above0, AtLeast0, in_range

OptimizerFactory = Callable[[Iterable[torch.nn.Parameter]], Optimizer]


@in_range
class SpearModule(LightningModule, RolloutHooks):
    """Trains a policy on fresh episodes and on replayed successes (paper §3, algorithm.md §2–3).

    Args:
        policy: the language model that acts.
        loss: on-policy loss.
        replay_loss: loss of replayed samples; ``None`` uses ``loss``.
        aggregation: how token losses become one number.
        max_response_length: L, the constant of ``seq-mean-token-sum-norm`` in tokens; ``None`` takes the largest
            response that the data module's agent can write.
        optimizer: makes the optimizer of the trainable parameters.
        learning_rate: warm-up and decay of its learning rate, by update.
        max_grad_norm: gradients are scaled down to this norm; ``None`` leaves them.
        entropy_bonus: weight of the policy entropy in the objective (0: off).
        reference_kl: weight of the k3 KL divergence to the policy as it was at the start (0: off).
        correction: where the old log-probabilities come from and how rollouts by another engine are corrected.

    Attributes:
        imitation_weight: γ(t), set by ``CurriculumSchedule``; 1 without it.
        weight_version: number of optimizer steps taken; names the weights that an episode was played with.
    """

    def __init__(
        self,
        policy: Policy,
        loss: PolicyLoss = PPOClip(),  # noqa: B008 - frozen
        replay_loss: PolicyLoss | None = None,
        aggregation: Aggregation = "seq-mean-token-sum-norm",
        max_response_length: int | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        learning_rate: LearningRateSchedule = LearningRateSchedule(),  # noqa: B008 - frozen
        max_grad_norm: Above0 | None = 1.0,
        entropy_bonus: float = 0.0,
        reference_kl: AtLeast0 = 0.0,
        correction: RolloutCorrection = RolloutCorrection(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.loss = loss
        self.replay_loss = replay_loss or loss
        self.aggregation: Aggregation = aggregation
        self.max_response_length = max_response_length
        self.max_grad_norm = max_grad_norm
        self.entropy_bonus = entropy_bonus
        self.correction = correction
        self.reference_kl = reference_kl
        self.reference = Reference(policy) if reference_kl > 0 else None
        self.imitation_weight = 1.0
        self.weight_version = 0
        self._optimizer_factory = optimizer
        self._learning_rate = learning_rate
        self._watch = Watch()
        self._train_metrics = MetricStore()
        self._evaluation_metrics = MetricStore()

    # --- set-up --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the parameters that require gradients.

        Raises:
            MisconfigurationException: its learning rate is 0.
        """
        optimizer = self._optimizer_factory([p for p in self.policy.parameters() if p.requires_grad])
        if all(float(group["lr"]) == 0 for group in optimizer.param_groups):
            raise MisconfigurationException(
                "model.optimizer has a learning rate of 0, so nothing would be learned: set model.optimizer's lr"
            )
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def setup(self, stage: str) -> None:
        """Resolve what depends on the data module; refuse strategies that would train wrongly.

        Raises:
            MisconfigurationException: the strategy cannot train this module.
        """
        check_strategy(self.trainer.strategy)
        if self.max_response_length is None:
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            self.max_response_length = int(datamodule.max_response_length)

    def on_train_epoch_start(self) -> None:
        """Key the global random state (dropout) to the iteration: a resumed run draws what it would have drawn."""
        seed = getattr(self.trainer.datamodule, "seed", 0)  # type: ignore[attr-defined]
        torch.manual_seed(stream_seed("iteration", seed, self.current_epoch, self.global_rank))

    # --- the update ----------------------------------------------------------------------------------------------

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> None:
        """One optimizer step; skipped on all ranks together when no token carries a gradient."""
        started = time.perf_counter()
        sources: list[Source] = ["fresh", "replay"] if self.imitation_weight > 0 else ["fresh"]
        normalizers = {source: self._normalizer(minibatch.micro_batches[source]) for source in sources}
        if not self._has_signal(minibatch, sources):
            if any(minibatch.steps[source] for source in sources):  # not a step that there was nothing to fill with
                self._count("update/skipped", 1.0)
            return
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        self._set_learning_rate(optimizer)
        optimizer.zero_grad()
        generator = torch.Generator(device=self.device)
        micro_batches = [batch for source in sources for batch in minibatch.micro_batches[source]]
        for number, batch in enumerate(micro_batches):
            generator.manual_seed(stream_seed("micro-batch", minibatch.seed, self.global_rank, number))
            last = number == len(micro_batches) - 1
            with nullcontext() if last else self._no_gradient_sync():
                self._backward(batch, minibatch, normalizers[batch.source], generator)
        norm = self._step(optimizer)
        self.weight_version += 1
        self._train_metrics.mean("update/grad_norm", norm)
        self._train_metrics.mean("update/learning_rate", optimizer.param_groups[0]["lr"])
        self._count("update/steps", 1.0)
        self._count("time/update", time.perf_counter() - started)

    def _normalizer(self, micro_batches: Sequence[MicroBatch]) -> float:
        """What the losses of one source are divided by, over all ranks."""
        masks = [batch.response_mask for batch in micro_batches]
        size = normalizer(masks, self.aggregation, self.max_response_length, reduce=total_over_ranks)
        return max(float(size), 1e-8)

    def _has_signal(self, minibatch: Minibatch, sources: Sequence[Source]) -> bool:
        counts = minibatch.tokens if self.entropy_bonus or self.reference_kl else minibatch.signal
        return any(counts[source] for source in sources)

    def _backward(self, batch: MicroBatch, minibatch: Minibatch, size: float, generator: torch.Generator) -> None:
        mask, fresh, temperature = batch.response_mask, batch.source == "fresh", minibatch.temperature
        loss_of, weight = (self.loss, 1.0) if fresh else (self.replay_loss, self.imitation_weight)
        stats = self._forward_pass(batch.input_ids, batch.attention_mask, temperature, loss_mask=mask > 0)
        token = loss_of(
            stats.logps,
            batch.old_logps,
            batch.advantages,
            mask,
            entropies=stats.entropies.detach(),
            generator=generator,
        )
        per_token = token.loss if batch.weights is None else token.loss * batch.weights
        if self.entropy_bonus and fresh:
            per_token = per_token - self.entropy_bonus * stats.entropies
        if self.reference is not None and fresh:
            with torch.no_grad():
                reference = self.reference(batch.input_ids, batch.attention_mask, temperature, loss_mask=mask > 0)
            kl = k3_kl(stats.logps, reference.logps)
            per_token = per_token + self.reference_kl * kl
            self._train_metrics.mean("update/reference_kl", _mean(kl, mask), mask.sum())
        loss = weight * aggregate_sum(per_token, mask, self.aggregation) / size
        # Data-parallel strategies average gradients over ranks; each rank holds its share of one global sum.
        self.manual_backward(loss * world_size())
        self._record_micro_batch(batch, stats, token, loss.detach() / minibatch.steps[batch.source])

    def _record_micro_batch(self, batch: MicroBatch, stats: TokenStats, token: TokenLoss, loss: Tensor) -> None:
        mask, prefix = batch.response_mask, "update" if batch.source == "fresh" else "replay"
        tokens = mask.sum()
        store = self._train_metrics
        with torch.no_grad():
            log_ratio = (stats.logps - batch.old_logps).clamp(-20, 20)
            for name, value in (
                ("clip_fraction", token.clip_fraction),
                ("cov_fraction", token.cov_fraction),
                ("approx_kl", token.approx_kl),
                ("entropy", _mean(stats.entropies, mask)),
                ("ratio", _mean(log_ratio.exp(), mask)),
                ("advantage", _mean(batch.advantages, mask)),
            ):
                store.mean(f"{prefix}/{name}", value.detach(), tokens)
            store.max(f"{prefix}/max_log_ratio", (log_ratio * mask).abs().max())
            store.sum(f"{prefix}/loss", loss)  # mean over the steps
            store.sum(f"{prefix}/tokens", tokens)
        lengths = batch.attention_mask.sum(dim=1)
        output = MicroBatchOutput(batch.source, stats.entropies.detach(), mask, batch.turns, lengths)
        for callback in update_listeners(self.trainer):
            callback.on_micro_batch_end(self.trainer, self, output)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0, *, loss_mask: Tensor | None = None
    ) -> TokenStats:
        """Log-probability and entropy of tokens; see :meth:`spear_lightning.policy.policy.Policy.evaluate`."""
        stats: TokenStats = self.policy(input_ids, attention_mask, temperature, loss_mask=loss_mask)
        return stats

    def _forward_pass(self, *args: Any, **kwargs: Any) -> TokenStats:
        """:meth:`forward`, through the DeepSpeed engine where there is one: it must see each pass."""
        strategy = self.trainer.strategy
        stats: TokenStats = (strategy.engine if isinstance(strategy, ZeroStrategy) else self)(*args, **kwargs)
        return stats

    def _step(self, optimizer: LightningOptimizer) -> Tensor:
        """Clip gradients and update; the norm before clipping."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy):  # gradients are partitioned: DeepSpeed clips them as it steps
            optimizer.step()
            return strategy.gradient_norm
        parameters = [p for p in self.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or float("inf"))
        optimizer.step()
        return norm

    def _no_gradient_sync(self) -> Any:
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _set_learning_rate(self, optimizer: LightningOptimizer) -> None:
        factor = self._learning_rate.factor(self.weight_version)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def correct(
        self, samples: Mapping[str, Sample], pad_id: int, max_tokens: int, temperature: float
    ) -> dict[str, Sample]:
        """Samples just played, corrected with the weights as they are now: before an iteration's first update.

        Every rank must call it.
        """
        with self.trainer.precision_plugin.train_step_context():  # in the arithmetic of the update
            return self.correction.apply(
                samples,
                self.policy,
                self.device,
                self._train_metrics,
                pad_id=pad_id,
                max_tokens=max_tokens,
                temperature=temperature,
            )

    # --- generation ----------------------------------------------------------------------------------------------

    def rollout_policy(self) -> Policy:
        """The policy to play with: the one that is trained, or a full copy of it where its weights are partitioned."""
        strategy = self.trainer.strategy
        return strategy.rollout_policy(self.policy) if isinstance(strategy, ZeroStrategy) else self.policy

    def release_rollout_policy(self) -> None:
        """Nothing is generated any more in this phase."""
        if isinstance(self.trainer.strategy, ZeroStrategy):
            self.trainer.strategy.release_rollout_policy()

    # --- metrics -------------------------------------------------------------------------------------------------

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Take the rollout into the metrics of its split."""
        store = self._store_of(rollout.split)
        record_rollout(store, rollout)
        if rollout.split == "train":
            ages = [self.weight_version - i.weight_version for i in rollout.episodes if i.turns]
            store.mean("rollout/staleness", sum(ages) / max(1, len(ages)), len(ages))

    def record_counts(self, values: dict[str, float]) -> None:
        """Take numbers that hold for the whole run, not for one rank (replay size, P50), into the training metrics."""
        for name, value in values.items():
            self._train_metrics.mean(name, value)

    def _store_of(self, split: Split) -> MetricStore:
        return self._train_metrics if split == "train" else self._evaluation_metrics

    def _count(self, name: str, value: float) -> None:
        # every rank takes the same steps: counted once
        self._train_metrics.sum(name, value if rank() == 0 else 0.0)

    def on_train_epoch_end(self) -> None:
        """Log the iteration's metrics; the x axis is the iteration."""
        self._train_metrics.sum("update/skipped", 0.0)
        values = self._train_metrics.compute(self.device)
        self._watch.idle_parts(self, values)
        self._log_values(values)

    def validation_step(self, rollout: Rollout, batch_idx: int) -> None:
        """Nothing to compute: the episodes were scored when they were played."""

    def test_step(self, rollout: Rollout, batch_idx: int) -> None:
        """Nothing to compute: the episodes were scored when they were played."""

    def predict_step(self, rollout: Rollout, batch_idx: int) -> Rollout:
        """The episodes themselves."""
        return rollout

    def on_validation_epoch_end(self) -> None:
        """Log held-out results."""
        self._log_values(self._evaluation_metrics.compute(self.device))

    def on_test_epoch_end(self) -> None:
        """Log test results."""
        self._log_values(self._evaluation_metrics.compute(self.device))

    def _log_values(self, values: dict[str, float]) -> None:
        # Already reduced over ranks. Loggers get them at once, before the checkpoint of the iteration is written: a run
        # that is killed in between must not lose the row. "step" puts what callbacks log on the same x axis.
        self.log_dict(values, logger=False)
        self.log("step", float(self.current_epoch))
        if not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(values, step=self.current_epoch)

    # --- state ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what resume needs beyond weights and optimizer, and what the checkpoint is recognised by."""
        checkpoint["spear"] = {
            "weight_version": self.weight_version,
            "policy": self.policy.fingerprint(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters.

        Raises:
            MisconfigurationException: the checkpoint is of another model or tokenizer, or not of this program.
        """
        if "spear" not in checkpoint:
            raise MisconfigurationException(
                "the checkpoint given as ckpt_path was not written by spear fit: give one of a run's own checkpoints"
            )
        state = checkpoint["spear"]
        self.check_policy(state["policy"])
        self.weight_version = int(state["weight_version"])

    def check_policy(self, found: Mapping[str, str | int]) -> None:
        """Compare the fingerprint in a checkpoint with that of the policy.

        Raises:
            MisconfigurationException: they differ; names in what, and the fix.
        """
        mine = self.policy.fingerprint()
        different = [name for name, value in mine.items() if found.get(name) != value]
        if different:
            raise MisconfigurationException(
                "the checkpoint given as ckpt_path is of another model: "
                + ", ".join(f"{name} is {found.get(name)}, here {mine[name]}" for name in different)
                + "; set model.policy to the one it was trained with, or start without ckpt_path"
            )


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values.detach() * mask).sum() / mask.sum().clamp(min=1)

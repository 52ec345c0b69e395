"""ZeRO through DeepSpeed, on GPUs and on CPUs, with gradients that are right under manual optimization.

Lightning's ``DeepSpeedStrategy`` refuses processes without a CUDA device, and under manual optimization it counts only
the last micro-batch of an optimizer step (stages 2 and 3). Here the module calls the DeepSpeed engine once per
micro-batch and DeepSpeed is told (``managed_gradient_accumulation: false``) that the caller decides when to step, so
any number of micro-batches adds up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

from spear_lightning.distributed.failures import errors_deferred
from spear_lightning.policy.snapshot import WeightSnapshot

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from spear_lightning.policy.policy import Policy

UNIVERSAL = "latest_universal"
"""File that tells a checkpoint for any number of ranks from one for those that wrote it."""


class ZeroStrategy(DeepSpeedStrategy):
    """Partitions optimizer state (stage 1), gradients (2) and parameters (3) over all ranks with DeepSpeed's ZeRO.

    One class for GPUs and CPUs. Whatever else ``DeepSpeedStrategy`` takes (offloading to CPU or NVMe, bucket sizes, a
    whole DeepSpeed ``config``) is passed on. Gradients are clipped by DeepSpeed at the module's ``max_grad_norm``.

    Args:
        stage: 0 replicates everything.
        overlap_comm: reduce gradients while the backward pass goes on; by default where DeepSpeed allows it with
            micro-batches counted by the caller (stages 2 and 3).
        timeout: after which a collective operation that some rank never joins is an error, as ``HH:MM:SS``.
        free_replica: under stage 3, whose parameters are partitioned, generation needs a full copy of the policy on
            each rank. ``True`` frees it between rollout phases, ``False`` keeps its memory.
        kwargs: of ``lightning.pytorch.strategies.DeepSpeedStrategy``.

    Raises:
        MisconfigurationException: a setting cannot work; the message names the key and the fix.
    """

    strategy_name = "zero"

    def __init__(
        self,
        stage: int = 2,
        overlap_comm: bool | None = None,
        timeout: timedelta = timedelta(minutes=30),
        free_replica: bool = True,
        **kwargs: Any,
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise MisconfigurationException(f"ZeroStrategy.stage must be 0, 1, 2 or 3, not {stage}")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        kwargs.setdefault("logging_batch_size_per_gpu", 1)  # a minibatch is no batch that Lightning could measure
        overlap = stage >= 2 if overlap_comm is None else overlap_comm
        super().__init__(stage=stage, overlap_comm=overlap, timeout=timeout, **kwargs)
        assert isinstance(self.config, dict)
        zero = self.config.setdefault("zero_optimization", {})
        self.stage = int(zero.get("stage", 0))
        if self.stage < 2 and zero.get("overlap_comm"):
            raise MisconfigurationException(
                f"ZeroStrategy: overlap_comm cannot be combined with stage {self.stage}, because micro-batches are "
                "counted by the module: set overlap_comm to false, or use stage 2 or 3"
            )
        if "gradient_accumulation_steps" in self.config:
            raise MisconfigurationException(
                "ZeroStrategy: the DeepSpeed config has gradient_accumulation_steps, but the number of micro-batches "
                "of an optimizer step varies here: remove it (data.max_tokens bounds a micro-batch)"
            )
        self.config["managed_gradient_accumulation"] = False
        # Any optimizer works with offloading; DeepSpeed would insist on its CPU Adam, which is faster beside a GPU.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self.free_replica = free_replica
        self._replica: WeightSnapshot | None = None
        self._norm = torch.zeros(())

    # --- processes -----------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Start the processes; on CPUs without what DeepSpeed compiles for inference only."""
        if not self._on_cpu:
            super().setup_environment()
            return
        import deepspeed

        if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
            raise MisconfigurationException(
                "ZeroStrategy on trainer.accelerator: cpu, but DeepSpeed has found another accelerator: set the "
                "environment variable DS_ACCELERATOR=cpu"
            )
        if self.precision_plugin.precision in ("16-mixed", "16-true"):
            raise MisconfigurationException(
                f"trainer.precision is {self.precision_plugin.precision}, which DeepSpeed has no kernels for on a CPU: "
                "use bf16-true, bf16-mixed or 32-true"
            )
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the other ranks, with a time-out that DeepSpeed's own process groups keep too."""
        if self._on_cpu:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()
        from deepspeed.utils import groups

        if groups._WORLD_GROUP is None:  # it would be cloned with torch's default of 30 minutes
            groups._WORLD_GROUP = torch.distributed.new_group(list(range(self.world_size)), timeout=self._timeout)

    @property
    def root_device(self) -> torch.device:
        """The device of this rank; on CPUs with the local rank as its index, which DeepSpeed asks for."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup(self, trainer: pl.Trainer) -> None:
        """Hand model and optimizer to DeepSpeed, which partitions the parameters under stage 3."""
        policy = getattr(self.lightning_module, "policy", None)
        if self.stage == 3 and policy is not None:
            import deepspeed

            # before DeepSpeed puts its hooks into the modules
            self._replica = WeightSnapshot(policy, lambda parameter: deepspeed.zero.GatheredParameters([parameter]))
        super().setup(trainer)
        if self.stage == 0 and hasattr(self.engine, "clip_fp32_gradients"):
            self.engine.clip_fp32_gradients = self._clip

    def _clip(self) -> None:
        """Clip as DeepSpeed does without partitions, but keep the norm."""
        limit = self.engine.gradient_clipping()
        self._norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit)

    # --- training ------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine: called once per micro-batch, it is the module's ``forward``."""
        return self.model

    @property
    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of the last step over all ranks, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(self._norm if norm is None else norm)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Nothing to block: DeepSpeed accumulates until the step."""
        yield

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step: it calls :attr:`engine` itself, micro-batch by micro-batch."""
        assert self.lightning_module is not None
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    def _format_batch_size_and_grad_accum_config(self) -> None:
        assert isinstance(self.config, dict)
        limit = getattr(self.lightning_module, "max_grad_norm", None)
        none = float("inf") if self.stage == 0 else 0.0  # without partitions the norm comes from the clipping
        self.config.setdefault("gradient_clipping", float(limit or none))
        super()._format_batch_size_and_grad_accum_config()

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shards of all ranks.

        Raises:
            OSError: this rank could not write; all ranks have been through it together nevertheless.
        """
        # what `ds_to_universal` asks for, which changes the number of ranks
        checkpoint = {**checkpoint, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        with errors_deferred(self.engine.checkpoint_engine, "save"):
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the shards of this number of ranks, or what ``spear reshard`` has made of those of another."""
        configuration = self.engine._config
        configuration.load_universal_checkpoint = (Path(checkpoint_path) / UNIVERSAL).exists()
        try:
            return super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            configuration.load_universal_checkpoint = False

    # --- generation ----------------------------------------------------------------------------------------------

    def rollout_policy(self, policy: Policy) -> Policy:
        """The policy to generate with. Every rank must call it.

        Args:
            policy: that is trained.

        Returns:
            ``policy`` itself, or under stage 3 a full copy of its weights as they are now: ranks generate for
            different lengths, so parameters cannot be gathered layer by layer on the way.
        """
        return policy if self._replica is None else self._replica.take()

    def release_rollout_policy(self) -> None:
        """The rollout phase is over: free the copy, if so configured."""
        if self._replica is not None and self.free_replica:
            self._replica.release()


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which gradients or generation would be wrong.

    Args:
        strategy: of the trainer.

    Raises:
        MisconfigurationException: it is one of Lightning's own sharded strategies; names the replacement.
    """
    own = "-c configs/strategy/zero{}.yaml"
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeroStrategy):
        raise MisconfigurationException(
            "trainer.strategy: Lightning's own DeepSpeedStrategy counts only the last micro-batch of an optimizer step "
            f"under manual optimization. Use ZeroStrategy: {own.format(3 if strategy.zero_stage_3 else 2)}"
        )
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"trainer.strategy: {type(strategy).__name__} shards parameters that generation needs whole. Use "
            f"ZeroStrategy ({own.format(3)}), which shards them too and gathers a copy to generate with; or ddp"
        )

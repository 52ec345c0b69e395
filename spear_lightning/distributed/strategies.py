"""Where a run runs: ZeRO through DeepSpeed, and which of Lightning's strategies can train a policy correctly."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from spear_lightning.distributed.zero import ZeroStrategy

__all__ = ["ZeroStrategy", "check_strategy"]


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

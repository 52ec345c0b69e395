"""What the strategy of a composed configuration partitions; nothing is started."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry

from spear_lightning.distributed.zero import ZeroStrategy, check_strategy
from spear_lightning.planning.shape import Layout, Place


def layout_of(strategy: Strategy, ranks: int, ranks_per_node: int) -> Layout:
    """What a strategy partitions, and where.

    Raises:
        ValueError: there are no formulas for the strategy.
    """
    if isinstance(strategy, SingleDeviceStrategy):
        return Layout()
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, ZeroStrategy):
        copied = not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
        return Layout(ranks, ranks_per_node, gradient_copy=copied)
    if not isinstance(strategy, ZeroStrategy):
        raise ValueError(
            f"trainer.strategy: spear plan has no formulas for {type(strategy).__name__}: plan with ddp or ZeroStrategy"
        )
    assert isinstance(strategy.config, dict)
    zero = strategy.config["zero_optimization"]
    places: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "disk"}

    def place(key: str) -> Place:
        return places[str((zero.get(key) or {}).get("device", "none"))]

    return Layout(
        ranks,
        ranks_per_node,
        strategy.stage,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap=bool(zero.get("overlap_comm")),
        live=int(zero.get("stage3_max_live_parameters", 1_000_000_000)),
        optimizer_place=place("offload_optimizer"),
        parameter_place=place("offload_param") if strategy.stage == 3 else "device",
        free_replica=strategy.free_replica,
    )


def make_strategy(given: Any, ranks: int) -> Strategy:
    """The strategy that ``trainer.strategy`` names, made but not started.

    Args:
        given: a name, a class path with arguments, or a strategy.
        ranks: of the run.

    Raises:
        ValueError: there is no such strategy, or it cannot train on so many ranks.
        MisconfigurationException: it would train wrongly.
    """
    if given == "auto":
        given = "ddp" if ranks > 1 else SingleDeviceStrategy()
    if isinstance(given, str):
        if given not in StrategyRegistry:
            raise ValueError(f"trainer.strategy: Lightning knows no strategy {given!r}; use ddp or ZeroStrategy")
        given = StrategyRegistry.get(given)
    strategy: Strategy = made("trainer.strategy", Strategy, given) if isinstance(given, Namespace) else given
    check_strategy(strategy)
    if isinstance(strategy, SingleDeviceStrategy) and ranks > 1:
        raise ValueError(f"trainer.strategy is for one device, but there are {ranks} ranks: use ddp or ZeroStrategy")
    return strategy


def ranks_of_a_node(given: Any, gpu: bool) -> int:
    """Ranks on a node, of what ``trainer.devices`` may be: a number, a list, either as text, or ``auto``."""
    if isinstance(given, str) and given != "auto":
        pieces = [piece for piece in given.split(",") if piece.strip()]
        given = int(pieces[0]) if len(pieces) == 1 and "," not in given else pieces
    if isinstance(given, list):
        return len(given)
    if given == "auto" or given == -1:
        return max(1, torch.cuda.device_count()) if gpu else 1
    return int(given)


def made(key: str, kind: Any, given: Any) -> Any:
    """An object of a configuration, made of its class path and arguments.

    Args:
        key: in the configuration, for messages.
        kind: its type.
        given: what the configuration says.

    Raises:
        ValueError: it cannot be made.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    try:
        return parser.instantiate_classes(parser.parse_object({"it": given})).it
    except Exception as error:
        raise ValueError(f"{key} cannot be made: {error}") from error

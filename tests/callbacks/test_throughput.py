"""Speed, the split of an iteration's time and the utilisation of the device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spear_lightning.callbacks import ThroughputMonitor
from spear_lightning.callbacks.throughput import _figures, matmul_flops
from spear_lightning.policy.flops import linear_weights, model_flops, shape_of
from spear_lightning.policy.policy import LoRA, Policy
from spear_lightning.training.hooks import MicroBatchOutput, update_listeners
from tests.callbacks.tiny import TinyData, TinyModule, make_trainer

ROWS, LENGTH = 3, 40


def policy_of(lora: LoRA | None = None) -> Policy:
    return Policy("embedded", lora=lora)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["all weights", "LoRA"])
def test_the_operations_of_the_model_are_those_that_are_counted(lora: LoRA | None) -> None:
    policy = policy_of(lora)
    ids = torch.randint(len(policy.tokenizer), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:  # it knows no fused attention on CPUs
        policy(ids, torch.ones_like(ids)).logps.sum().backward()
    shape, predicted = shape_of(policy.model), ROWS * (LENGTH - 1)
    recomputed = 2 * shape.vocabulary * shape.hidden * predicted  # the chunked head, once more in the backward pass
    needed = model_flops(shape, linear_weights(policy.model), ROWS * LENGTH, 0, predicted)
    # With adapters the gradient stops at the first layer's.
    assert counter.get_total_flops() - recomputed == pytest.approx(needed, rel=0.1 if lora else 0.001)


def test_attention_counts_each_pair_of_tokens_once() -> None:
    shape = shape_of(policy_of().model)
    attention = model_flops(shape, 0, 0.0, LENGTH**2, 0.0)
    pairs = LENGTH**2 / 2
    # q·k and weight·v, a multiplication and an addition each, forward and twice that backward
    assert attention == pairs * shape.layers * shape.queries * 2 * 2 * 3


def test_counts_are_summed_and_seconds_are_those_of_the_slowest_rank() -> None:
    mine = (
        (10.0, 6.0, 5.0, 3.0),
        (8, 300, 6e9, 2e9),
    )  # iteration, rollout, played, update; episodes, tokens, flops, peak
    other = (10.5, 5.0, 4.0, 4.0), (12, 500, 2e9, 2e9)
    assert _figures([mine, other]) == {
        "time/iteration": 10.5,
        "time/rollout": 6.0,
        "time/training": 4.0,
        "time/other": 0.5,
        "rollout/episodes_per_second": 20 / 5.0,
        "update/tokens_per_second": 800 / 4.0,
        "time/mfu": 8e9 / (4.0 * 4e9),
    }


class Waiting(TinyModule):
    """Takes its time over an update, with the module's own policy beside it so that there is something to count."""

    def __init__(self, with_policy: bool = True) -> None:
        super().__init__()
        self.policy = policy_of() if with_policy else None

    def training_step(self, batch: float, batch_idx: int) -> None:
        time.sleep(0.05)
        optimizer = self.optimizers()
        self.manual_backward(self.weight.sum())
        optimizer.step()
        lengths, mask = torch.tensor([30, 10]), torch.ones(2, 30)
        output = MicroBatchOutput("fresh", mask, mask, mask.short(), lengths)
        for listener in update_listeners(self.trainer):
            listener.on_micro_batch_end(self.trainer, self, output)


def logged(folder: Path, monitor: ThroughputMonitor, module: TinyModule) -> dict[str, float]:
    trainer = make_trainer(folder, [monitor], max_epochs=1, limit_val_batches=1.0)
    trainer.fit(module, datamodule=TinyData())
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_a_run_tells_its_parts(tmp_path: Path) -> None:
    module = Waiting()
    found = logged(tmp_path, ThroughputMonitor(peak_flops=1e9), module)
    parts = found["time/rollout"] + found["time/training"] + found["time/other"]
    assert found["time/iteration"] == pytest.approx(parts)
    assert found["time/training"] >= 0.1  # two updates of 0.05 s
    assert found["rollout/episodes_per_second"] == pytest.approx(4 / 0.3)  # four episodes, as TinyData says
    assert found["update/tokens_per_second"] == pytest.approx(80 / found["time/training"])
    shape, matrices = shape_of(module.policy.model), linear_weights(module.policy.model)  # type: ignore[union-attr]
    flops = 2 * model_flops(shape, matrices, 40, 30**2 + 10**2, 60)
    assert found["time/mfu"] == pytest.approx(flops / found["time/training"] / 1e9, rel=1e-5)


@pytest.mark.parametrize(("peak", "with_policy"), [("auto", True), (1e9, False)], ids=["unknown peak", "no policy"])
def test_no_utilisation_is_made_up(tmp_path: Path, peak: Any, with_policy: bool) -> None:
    found = logged(tmp_path, ThroughputMonitor(peak), Waiting(with_policy))
    assert "time/mfu" not in found
    assert found["update/tokens_per_second"] > 0


def test_the_peak_is_measured_when_asked(tmp_path: Path) -> None:
    assert 1e8 < matmul_flops(torch.device("cpu"), torch.float32, tries=1) < 1e14
    assert 0 < logged(tmp_path, ThroughputMonitor("measure"), Waiting())["time/mfu"] < 1


@pytest.mark.parametrize("peak", [0, -1.0, float("nan"), "fast"])
def test_a_peak_out_of_range_is_refused(peak: Any) -> None:
    with pytest.raises(ValueError, match=r"ThroughputMonitor\.peak_flops must be above 0 or one of auto, measure"):
        ThroughputMonitor(peak)

"""ZeRO on two ranks takes the steps of one process, and goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from transformers import AutoModelForCausalLM

from spear_lightning.checkpoints import Manifest, problem
from spear_lightning.export import export_checkpoint
from spear_lightning.strategies import check_strategy
from tests.integration.conftest import ROOT
from tests.integration.test_training import curve

pytestmark = pytest.mark.slow

# Plain SGD: Adam's first steps have the size of the learning rate whatever the gradient, and would hide an error in it.
PLAIN = {
    "trainer.num_sanity_val_steps": 0,
    "trainer.check_val_every_n_epoch": 10,
    "model.loss": {"class_path": "PPOClip"},  # Clip-Cov looks at a micro-batch at a time, so the cut shows
    "model.replay_loss": {"class_path": "PPOClip"},
    "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "data.reward.invalid_penalty": 0.1,  # tells episodes apart even where none succeeds
    "data.max_tokens": 1500,  # several micro-batches a step, not the same number in each
    "trainer.callbacks": [
        {"class_path": "CurriculumSchedule", "init_args": {"imitation_warmup": 1, "tool_reward_decay": 2}},
        {"class_path": "RolloutProgress"},
        {"class_path": "ShardedCheckpoint", "init_args": {"keep": 9, "monitor": None}},
    ],
}


def zero(stage: int, **more: object) -> dict[str, object]:
    buckets = {"allgather_bucket_size": 1_000_000, "reduce_bucket_size": 1_000_000}
    strategy = {"class_path": "ZeroStrategy", "init_args": {"stage": stage, **buckets, **more}}
    return {**PLAIN, "trainer.devices": 2, "trainer.strategy": strategy}


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    assert problem(checkpoint, hashes=True) is None
    checkpoint /= "state"
    if checkpoint.is_file():
        return torch.load(checkpoint, weights_only=False)["state_dict"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(checkpoint, tag="checkpoint")


@pytest.fixture(scope="module")
def single(spear_in, tmp_path_factory) -> Path:
    """The run of a single process: three iterations, twelve updates."""
    folder = tmp_path_factory.mktemp("single")
    spear_in(folder, "fit", PLAIN)
    assert sum(float(row["update/steps"]) for row in curve(folder)) == 12
    assert sum(float(row["replay/used"]) for row in curve(folder)) > 0
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_takes_the_steps_of_a_single_process(spear_in, single, tmp_path, stage):
    spear_in(tmp_path, "fit", zero(stage))
    expected, given = weights(single / "checkpoints/iteration-00003"), weights(tmp_path / "checkpoints/iteration-00003")
    for name, tensor in expected.items():
        if name in given:  # tied weights are stored once
            torch.testing.assert_close(given[name], tensor, rtol=1e-5, atol=1e-5)
    assert "policy.model.model.embed_tokens.weight" in given
    for mine, other in zip(curve(tmp_path), curve(single), strict=True):
        for name in (
            "rollout/success",
            "reward/total",
            "update/grad_norm",
            "update/entropy",
            "replay/used",
            "replay/p50",
        ):
            assert float(mine[name]) == pytest.approx(float(other[name]), rel=1e-4), name
    manifest = Manifest.load(tmp_path / "checkpoints/iteration-00003")
    assert (manifest.stage, manifest.world_size, manifest.iteration) == (stage, 2, 3)
    assert sum("optim_states" in name for name in manifest.files) == 2, "a shard from each rank"
    if stage == 3:
        for run in (tmp_path, single):
            export_checkpoint(str(run / "checkpoints/iteration-00003"), str(tmp_path / "exported" / run.name))
        mine, other = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "exported" / run.name).eval() for run in (tmp_path, single)
        )
        ids = torch.arange(3, 40)[None]
        torch.testing.assert_close(mine(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
    if stage > 1:
        resumed = tmp_path / "resumed"
        shutil.copytree(tmp_path / "checkpoints/iteration-00002", resumed / "checkpoints/iteration-00002")
        spear_in(resumed, "fit", zero(stage), "--ckpt_path", "last")
        assert len(curve(resumed)) == 1, "it went on, and did not start over"
        mine, other = (
            {name: value for name, value in curve(run)[-1].items() if value} for run in (resumed, tmp_path)
        )  # a column that only earlier iterations fill is not there
        assert mine == other
        again = weights(resumed / "checkpoints/iteration-00003")
        for name, tensor in given.items():
            torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"trainer.strategy": "deepspeed_stage_2"}, ["ZeroStrategy", "zero2.yaml"]),
        (zero(1, overlap_comm=True), ["overlap_comm", "stage 1"]),
        (zero(4), ["ZeroStrategy.stage"]),
        (zero(2, config={"gradient_accumulation_steps": 2}), ["gradient_accumulation_steps"]),
        ({**zero(2), "trainer.precision": "16-mixed"}, ["trainer.precision", "bf16-true"]),
    ],
)
def test_what_cannot_work_is_refused(spear, changes, names):
    finished = spear("fit", {**PLAIN, **changes}, check=False)
    assert finished.returncode == 2
    for name in names:
        assert name in finished.stderr
    assert "Traceback" not in finished.stderr


def test_sharding_that_generation_cannot_use_is_refused():
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy.*zero3\.yaml"):
        check_strategy(FSDPStrategy())
    check_strategy(DDPStrategy())


def test_every_strategy_overlay_composes(spear):
    for overlay in sorted((ROOT / "configs/strategy").glob("*.yaml")):
        assert "ZeroStrategy" in spear("fit", {}, "-c", str(overlay), "--print_config").stdout


def test_a_rank_that_comes_after_the_time_out_is_an_error(spear):
    """With DeepSpeed's own 30 minutes such a delay would go unnoticed."""
    late = {"class_path": "tests.integration.late.Late", "init_args": {"seconds": 40}}
    finished = spear("fit", {**zero(2, timeout="00:00:15"), "trainer.callbacks": [late]}, check=False)
    assert finished.returncode != 0
    assert "timed out" in finished.stderr.lower(), finished.stderr[-3000:]

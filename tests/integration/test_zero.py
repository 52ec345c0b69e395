"""ZeRO on two ranks takes the steps of one process, and goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from transformers import AutoModelForCausalLM

from spear_lightning.checkpoint.manifest import Manifest
from spear_lightning.cli.export import export_checkpoint
from spear_lightning.distributed.zero import check_strategy
from tests.integration.conftest import ROOT
from tests.integration.runs import ADAM, PLAIN, curve, replay, weights, zero

pytestmark = pytest.mark.slow

TWO = {"trainer.max_epochs": 2}  # what the first iteration stores, the second replays
DDP = {**PLAIN, **TWO, "trainer.devices": 2, "trainer.strategy": "ddp"}
STRATEGIES = {"ddp": DDP, **{f"zero-{stage}": {**zero(stage), **TWO} for stage in range(4)}}


@pytest.fixture(scope="module")
def single(spear_in, tmp_path_factory) -> Path:
    """The run of a single process: two iterations, eight updates."""
    folder = tmp_path_factory.mktemp("single")
    spear_in(folder, "fit", {**PLAIN, **TWO})
    assert sum(float(row["update/steps"]) for row in curve(folder)) == 8
    assert sum(float(row["replay/used"]) for row in curve(folder)) > 0
    return folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_take_the_steps_of_a_single_process_and_resume_bit_for_bit(spear_in, single, tmp_path, name):
    spear_in(tmp_path, "fit", STRATEGIES[name])
    expected, given = (weights(run / "checkpoints/iteration-00002/state") for run in (single, tmp_path))
    for key, tensor in expected.items():
        if key in given:  # tied weights are stored once
            torch.testing.assert_close(given[key], tensor, rtol=1e-5, atol=1e-5)
    assert "policy.model.model.embed_tokens.weight" in given
    for mine, other in zip(curve(tmp_path), curve(single), strict=True):
        for metric in (
            "rollout/success",
            "reward/total",
            "update/grad_norm",
            "update/entropy",
            "replay/used",
            "replay/p50",
        ):
            assert float(mine[metric]) == pytest.approx(float(other[metric]), rel=1e-4), metric
    stage = None if name == "ddp" else int(name[-1])
    manifest = Manifest.load(tmp_path / "checkpoints/iteration-00002")
    assert (manifest.stage, manifest.world_size, manifest.iteration) == (stage, 2, 2)
    shards = sum("optim_states" in file for file in manifest.files)
    assert shards == (2 if stage else 0), "a shard from each rank, where something is partitioned"
    if stage == 3:
        same_logits_after_export(tmp_path, single)

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "checkpoints/iteration-00001", resumed / "checkpoints/iteration-00001")
    spear_in(resumed, "fit", STRATEGIES[name], "--ckpt_path", "last")
    assert len(curve(resumed)) == 1, "it went on, and did not start over"
    mine, other = (
        {name: value for name, value in curve(run)[-1].items() if value} for run in (resumed, tmp_path)
    )  # a column that only earlier iterations fill is not there
    assert mine == other
    again = weights(resumed / "checkpoints/iteration-00002/state")
    for key, tensor in given.items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=0)
    for rank in range(2):
        mine, other = (replay(run / "checkpoints/iteration-00002", rank) for run in (resumed, tmp_path))
        assert [entry["key"] for entry in mine] == [entry["key"] for entry in other]
        for one, another in zip(mine, other, strict=True):
            assert {**one, "payload": None} == {**another, "payload": None}
            assert all(torch.equal(one["payload"][field], another["payload"][field]) for field in another["payload"])
    held = [{entry["key"] for entry in replay(tmp_path / "checkpoints/iteration-00002", rank)} for rank in range(2)]
    assert any(held)
    assert not held[0] & held[1]
    assert held[0] | held[1] == {entry["key"] for entry in replay(single / "checkpoints/iteration-00002", 0)}


def same_logits_after_export(run: Path, other: Path) -> None:
    for folder in (run, other):
        export_checkpoint(str(folder / "checkpoints/iteration-00002"), str(run / "exported" / folder.name))
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(run / "exported" / folder.name).eval() for folder in (run, other)
    )
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


ONE = {"trainer.max_epochs": 1}


def test_offloading_changes_nothing(spear_in, single, tmp_path):
    spear_in(tmp_path, "fit", {**zero(3, offload_optimizer=True, offload_parameters=True), **ONE})
    expected, given = (weights(run / "checkpoints/iteration-00001/state") for run in (single, tmp_path))
    for name in given:
        torch.testing.assert_close(given[name], expected[name], rtol=1e-5, atol=1e-5)
    assert float(curve(tmp_path)[0]["update/grad_norm"]) == pytest.approx(
        float(curve(single)[0]["update/grad_norm"]), rel=1e-4
    )


def test_bfloat16_trains_and_resumes_bit_for_bit(spear_in, single, tmp_path):
    changes = {**zero(2), "trainer.precision": "bf16-true", "model.optimizer": ADAM, "trainer.max_epochs": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    spear_in(whole, "fit", changes)
    assert float(curve(whole)[0]["update/entropy"]) == pytest.approx(float(curve(single)[0]["update/entropy"]), rel=0.1)
    shutil.copytree(whole / "checkpoints/iteration-00001", resumed / "checkpoints/iteration-00001")
    spear_in(resumed, "fit", changes, "--ckpt_path", "last")
    mine, other = (weights(run / "checkpoints/iteration-00002/state") for run in (resumed, whole))
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert any(tensor.dtype == torch.float32 and bool((tensor != tensor.bfloat16()).any()) for tensor in mine.values())
    assert float(curve(resumed)[-1]["update/grad_norm"]) == float(curve(whole)[-1]["update/grad_norm"])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"trainer.strategy": "deepspeed_stage_2"}, ["ZeroStrategy", "zero2.yaml"]),
        (zero(1, overlap_comm=True), ["overlap_comm", "stage 1"]),
        (zero(4), ["trainer.strategy.stage must be 0, 1, 2 or 3"]),
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

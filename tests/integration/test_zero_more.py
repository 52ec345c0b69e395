"""ZeRO beside the plain run: adapters, generation in between, ranks that come late or never."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from spear_lightning.cli.export import export_checkpoint
from spear_lightning.policy.policy import Policy
from tests.integration.alternating import train as alternate
from tests.integration.conftest import start_spear
from tests.integration.runs import PLAIN, curve, weights, zero
from tests.processes import start_ranks

pytestmark = pytest.mark.slow

DDP = {**PLAIN, "trainer.devices": 2, "trainer.strategy": "ddp"}
ONE = {"trainer.max_epochs": 1}


def test_generation_in_between_leaves_training_bit_for_bit_the_same(tmp_path):
    """Under stage 3, with ranks that generate for different lengths, the replica freed between phases or kept."""
    for name, generate, free in (("without", False, True), ("freed", True, True), ("kept", True, False)):
        ranks = start_ranks(2, alternate, tmp_path / name, generate, free, folder=tmp_path / f"{name}-printed")
        assert ranks.join(60) == [0, 0], ranks.printed()
    expected, start = weights(tmp_path / "without/state"), Policy("embedded").state_dict()
    assert any(not torch.equal(expected[f"policy.{name}"], tensor) for name, tensor in start.items())
    for name in ("freed", "kept"):
        given = weights(tmp_path / name / "state")
        assert all(torch.equal(given[key], tensor) for key, tensor in expected.items()), name


def test_adapters_with_a_reference_train_the_same_under_stage_3(spear_in, tmp_path):
    pytest.importorskip("peft")
    lora = {"model.policy.lora": {"rank": 2}, "model.policy.gradient_checkpointing": True, "model.reference_kl": 0.1}
    for name, changes in (("single", PLAIN), ("zero", zero(3))):
        spear_in(tmp_path / name, "fit", {**changes, **lora, **ONE})
    expected, given = (weights(tmp_path / name / "checkpoints/iteration-00001/state") for name in ("single", "zero"))
    adapters = [name for name in given if "lora_B" in name]
    assert any(bool(given[name].any()) for name in adapters), "they start at zero: nothing was trained"
    for name in given:
        torch.testing.assert_close(given[name], expected[name], rtol=1e-5, atol=1e-5)
    mine, other = (float(curve(tmp_path / name)[0]["update/reference_kl"]) for name in ("zero", "single"))
    assert mine == pytest.approx(other, rel=1e-3)
    for name in ("single", "zero"):
        checkpoint = str(tmp_path / name / "checkpoints/iteration-00001")
        export_checkpoint(checkpoint, str(tmp_path / f"{name}-merged"), merge_lora=True)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged").eval() for name in ("single", "zero"))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_rank_that_comes_after_the_time_out_is_an_error(spear):
    """With DeepSpeed's own 30 minutes such a delay would go unnoticed."""
    late = {"class_path": "tests.integration.late.Late", "init_args": {"seconds": 18}}
    finished = spear("fit", {**zero(2, timeout="00:00:08"), "trainer.callbacks": [late]}, check=False)
    assert finished.returncode != 0
    assert "rank 0 has waited for another rank until the time-out" in finished.stderr, finished.stderr[-3000:]


@pytest.mark.parametrize("strategy", ["zero", "ddp"])
def test_a_rank_that_never_arrives_is_an_error(games_cache, tmp_path, strategy):
    ddp = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": "00:00:06"}}
    changes = zero(2, timeout="00:00:06") if strategy == "zero" else {**DDP, "trainer.strategy": ddp}
    ranks = start_spear("fit", games_cache, tmp_path / "run", changes)
    ranks.kill(1)
    assert ranks.join(60)[0] != 0
    last = ranks.printed("err").strip().splitlines()[-1]
    assert "has waited for another rank until the time-out (trainer.strategy.init_args.timeout)" in last

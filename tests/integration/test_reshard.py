"""A checkpoint of some ranks becomes one of another number: weights, moments and replay, none lost and none doubled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spear_lightning.checkpoint.manifest import Manifest, newest_checkpoint, problem
from spear_lightning.cli.export import export_checkpoint
from spear_lightning.cli.main import main
from tests.integration.runs import ADAM, PLAIN, curve, replay, weights, zero

pytestmark = pytest.mark.slow


def settings(stage: int, ranks: int) -> dict[str, object]:
    return {**zero(stage, ranks), "model.optimizer": ADAM}


@pytest.fixture(scope="module")
def uninterrupted(spear_in, tmp_path_factory) -> Path:
    """Three iterations of a single process without ZeRO."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    spear_in(folder, "fit", {**PLAIN, "model.optimizer": ADAM})
    return folder


def entries(folder: Path, ranks: int) -> Counter[tuple[object, ...]]:
    return Counter(
        (entry["key"], entry["iteration"], entry["payload"]["ids"].numpy().tobytes())
        for rank in range(ranks)
        for entry in replay(folder, rank)
    )


@pytest.mark.parametrize(("stage", "before", "after"), [(3, 2, 1), (1, 1, 2), (2, 2, 3)])
def test_training_goes_on_with_another_number_of_ranks(spear_in, uninterrupted, tmp_path, stage, before, after):
    run, checkpoints = tmp_path / "run", tmp_path / "run/checkpoints"
    spear_in(run, "fit", {**settings(stage, before), "trainer.max_epochs": 2})
    old = newest_checkpoint(checkpoints)
    refused = spear_in(run, "fit", settings(stage, after), "--ckpt_path", "last", check=False)
    assert refused.returncode == 2
    assert f"spear reshard {old}" in refused.stderr

    main(["reshard", str(old)])
    new = newest_checkpoint(checkpoints)
    assert new != old
    assert problem(new, hashes=True) is None
    assert (Manifest.load(new).universal, Manifest.load(new).iteration) == (True, 2)
    assert sum(entries(new, before).values()) > 1, "nothing to deal: the test proves nothing"

    loaded = tmp_path / "loaded"
    save = {"class_path": "tests.integration.saved.SaveOnStart", "init_args": {"folder": str(loaded)}}
    changes = {**settings(stage, after), "trainer.callbacks": [*PLAIN["trainer.callbacks"], save]}
    spear_in(run, "fit", changes, "--ckpt_path", "last")
    for name, tensor in weights(old / "state").items():
        torch.testing.assert_close(weights(loaded / "state")[name], tensor, rtol=0, atol=0)
    assert entries(loaded, after) == entries(new, before) == entries(old, before)
    assert len(curve(run)) == 3
    for name in ("rollout/success", "reward/total", "update/grad_norm", "replay/used", "replay/p50"):
        assert float(curve(run)[-1][name]) == pytest.approx(float(curve(uninterrupted)[-1][name]), rel=1e-3), name
    final = weights(newest_checkpoint(checkpoints) / "state")
    assert Manifest.load(newest_checkpoint(checkpoints)).ranks == after
    for name, tensor in weights(uninterrupted / "checkpoints/iteration-00003/state").items():
        if name in final:  # with wrong moments the difference is a hundred times that
            torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-4)
    if before == 2:
        for number, checkpoint in enumerate((old, new)):
            export_checkpoint(str(checkpoint), str(tmp_path / f"exported-{number}"), config=str(run / "config.yaml"))
        one, other = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f"exported-{number}").state_dict() for number in (0, 1)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_converted_is_named(spear_in, uninterrupted, tmp_path, capsys):
    def refused(checkpoint: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["reshard", str(checkpoint)])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "by any number of ranks as it is" in refused(uninterrupted / "checkpoints/iteration-00003")
    assert "manifest.json is missing" in refused(tmp_path)
    spear_in(tmp_path / "sgd", "fit", {**zero(2, 1), "trainer.max_epochs": 1})
    sgd = tmp_path / "sgd/checkpoints/iteration-00001"
    assert "torch.optim.AdamW" in refused(sgd)
    assert [path.name for path in sgd.parent.glob("*ation*")] == [sgd.name], "nothing half done is left"
    shard = next(sgd.rglob("*optim_states.pt"))
    shard.unlink()
    assert f"{shard} is missing" in refused(sgd)

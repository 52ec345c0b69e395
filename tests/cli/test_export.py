"""An exported checkpoint loads with plain transformers and gives the policy's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from spear_lightning.cli.export import export_checkpoint
from spear_lightning.cli.main import main
from spear_lightning.policy.policy import LoRA, Policy


def run_folder(policy: Policy, folder: Path, settings: dict[str, object]) -> Path:
    """What ``spear fit`` leaves: a composed configuration, and a checkpoint below it."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"policy": settings}, "data": {"max_turns": 3}}))
    state = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 4}, folder / "checkpoints/last.ckpt")
    return folder / "checkpoints/last.ckpt"


@pytest.fixture
def trained(tiny_model_folder, tmp_path):
    def make(lora: LoRA | None = None) -> tuple[Policy, Path]:
        folder = tiny_model_folder
        policy = Policy(folder, lora=lora)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        settings: dict[str, object] = {"model": folder}
        if lora is not None:  # as a composed configuration says it
            settings = {
                "class_path": "spear_lightning.policy.policy.Policy",
                "init_args": {**settings, "lora": vars(lora)},
            }
        return policy, run_folder(policy, tmp_path / "run", settings)

    return make


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


def test_the_folder_is_a_model_like_any_other(trained, tmp_path, capsys):
    policy, checkpoint = trained()
    main(["export", str(checkpoint), str(tmp_path / "out")])
    assert "out" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(policy.causal_lm), rtol=0, atol=0)
    assert Policy(str(tmp_path / "out")).fingerprint() == policy.fingerprint()
    card = (tmp_path / "out/README.md").read_text()
    assert "after 5 iterations" in card
    assert "max_turns: 3" in card


def test_adapters_are_merged_on_request(trained, tmp_path):
    pytest.importorskip("peft")
    policy, checkpoint = trained(LoRA(rank=2))
    export_checkpoint(str(checkpoint), str(tmp_path / "merged"), merge_lora=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(policy.model), rtol=1e-5, atol=1e-5)
    export_checkpoint(str(checkpoint), str(tmp_path / "adapters"))
    assert (tmp_path / "adapters/adapter_config.json").is_file()
    assert not (tmp_path / "adapters/model.safetensors").exists()


def test_what_cannot_be_exported_is_named(trained, tiny_policy, tmp_path, capsys):
    _, checkpoint = trained()
    tiny_policy("llama").save_pretrained(tmp_path / "llama")
    run = checkpoint.parents[1]

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["export", *map(str, arguments), str(tmp_path / "out")])
        assert stop.value.code == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no/such.ckpt" in refused("no/such.ckpt")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"model": {"policy": {"model": str(tmp_path / "llama")}}}))
    assert "other.yaml" in refused(f"--config={other}", checkpoint)
    other.write_text("data: {}")
    assert "model.policy" in refused(f"--config={other}", checkpoint)
    torch.save({"state_dict": {}}, run / "checkpoints/empty.ckpt")
    assert "holds no policy" in refused(run / "checkpoints/empty.ckpt")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "last.ckpt" in refused(checkpoint)
    lonely = tmp_path / "lonely.ckpt"
    lonely.write_bytes(whole)
    assert "--config" in refused(lonely)

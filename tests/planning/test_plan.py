"""``spear plan`` takes what ``spear fit`` takes, starts nothing, and says whether it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, AdamW

from spear_lightning.cli.main import main
from spear_lightning.cli.plan import parse_bytes
from spear_lightning.planning.inputs import state_per_parameter
from spear_lightning.policy.flops import shape_of
from spear_lightning.policy.policy import Policy

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ["-c", str(ROOT / "configs/quickstart.yaml")]
ALFWORLD = ["-c", str(ROOT / "configs/alfworld.yaml"), "-c", str(ROOT / "configs/model/qwen2.5-7b.yaml")]
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def zero(stage: int) -> list[str]:
    return ["-c", str(ROOT / f"configs/strategy/zero{stage}.yaml")]


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """Runs the command; gives the exit status, what was printed, and the JSON."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> tuple[int, str, dict]:
        status = 0
        try:
            main(["plan", *arguments, f"--json={tmp_path / 'plan.json'}"])
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        record = json.loads((tmp_path / "plan.json").read_text()) if status != 2 else {}
        return status, printed.out + printed.err, record

    return run


@pytest.fixture
def qwen(tmp_path) -> list[str]:
    """Qwen2.5-7B as a folder with nothing but its configuration."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_7B))
    return [*ALFWORLD, f"--model.policy.model={folder}"]


def parts(record: dict) -> dict[str, int]:
    return {part["name"]: part["bytes"] for part in record["parts"]}


def test_the_quickstart_fits_and_its_parameters_are_the_policy_s(plan):
    status, text, record = plan(*QUICKSTART, "--memory=8GiB")
    assert status == 0
    assert "fits" in text
    policy = Policy("embedded")
    weights = sum(p.numel() for p in policy.parameters())
    found = parts(record)
    assert (found["parameters"], found["gradients"], found["optimizer"]) == (4 * weights, 4 * weights, 8 * weights)
    assert (record["ranks"], record["capacity"], record["model"]["parameters"]) == (1, 8 * 1024**3, weights)
    assert record["needed"] == max(record["totals"].values())
    assert shape_of(policy.causal_lm).parameters == record["model"]["parameters"], "tied weights count once"


def test_two_ranks_of_zero_3_share_a_node_s_ram(plan):
    status, text, record = plan(*QUICKSTART, *zero(3), "--trainer.devices=2", "--memory=16GiB")
    assert status == 0
    assert (record["strategy"], record["stage"], record["ranks"]) == ("ZeroStrategy", 3, 2)
    assert record["needed"] == 2 * max(record["totals"].values())
    weights, found = record["model"]["parameters"], parts(record)
    assert (found["parameters"], found["optimizer"], found["generation replica"]) == (
        2 * weights,
        6 * weights,
        4 * weights,
    )
    assert record["deepspeed_model_states"] > 0
    assert "DeepSpeed's own estimate" in text


def test_a_large_model_needs_zero_and_is_told_so(plan, qwen):
    status, text, record = plan(*qwen, "--trainer.devices=8", "--memory=80GiB")
    assert status == 1
    assert "does not fit" in text
    assert record["model"]["parameters"] == 7_615_616_512
    assert record["strategy"] == "DDPStrategy"
    assert record["deepspeed_model_states"] is None
    assert any("zero3.yaml" in suggestion["change"] for suggestion in record["suggestions"])
    assert all(suggestion["needed"] <= record["capacity"] for suggestion in record["suggestions"])
    promised = next(r["needed"] for r in record["suggestions"] if "zero3.yaml" in r["change"])
    status, _, record = plan(*qwen, *zero(3), "--trainer.devices=8", "--memory=80GiB")
    assert (status, record["needed"]) == (0, promised), "the suggestion is the plan one gets by following it"
    states = sum(parts(record)[name] for name in ("parameters", "gradients", "optimizer", "float32 gradients"))
    largest = 4 * record["model"]["largest"]  # DeepSpeed counts the gathered layer among the states
    assert states + largest == pytest.approx(record["deepspeed_model_states"], rel=0.1)


def test_nodes_offloading_and_precision_are_read(plan, qwen):
    common = [*qwen, *zero(2), "--trainer.devices=8", "--memory=80GiB"]
    _, _, one = plan(*common)
    _, _, four = plan(*common, "--trainer.num_nodes=4")
    assert four["ranks"] == 32
    assert parts(four)["optimizer"] == pytest.approx(parts(one)["optimizer"] / 4, abs=1)
    _, _, offloaded = plan(*common, "--trainer.strategy.init_args.offload_optimizer=true")
    places = {part["name"]: part["place"] for part in offloaded["parts"]}
    assert places["optimizer"] == "host"
    assert offloaded["host_of_a_node"] > one["host_of_a_node"]
    _, _, full = plan(*common, "--trainer.precision=32-true")
    assert parts(full)["parameters"] == 2 * parts(one)["parameters"]


def test_adapters_reference_and_checkpointing(plan, qwen):
    common = [*qwen, "--trainer.devices=1", "--memory=80GiB", "--model.reference_kl=0.01"]
    _, _, full = plan(*common, "--model.policy.gradient_checkpointing=false")
    assert parts(full)["reference"] == parts(full)["parameters"]
    _, _, recomputed = plan(*common)
    assert parts(recomputed)["activations"] < 0.5 * parts(full)["activations"]
    pytest.importorskip("peft")
    _, _, adapted = plan(*common, "--model.policy.lora.rank=8", "--model.policy.dtype=bfloat16")
    assert "reference" not in parts(adapted)
    assert adapted["model"]["trainable"] < 0.01 * adapted["model"]["parameters"]
    assert parts(adapted)["optimizer"] == 4 * adapted["model"]["trainable"]


def test_where_nothing_helps_a_chain_of_changes_is_offered(plan, qwen):
    _, text, record = plan(*qwen, *zero(2), "--trainer.devices=8", "--memory=24GiB")
    assert len(record["suggestions"]) == 1
    assert " and " in record["suggestions"][0]["change"]
    _, text, record = plan(*qwen, "--trainer.devices=1", "--memory=1GiB")
    assert record["suggestions"] == []
    assert "policy.lora" in text


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--memory=lots"], ["--memory", "lots", "80GiB"]),
        (["--memory=0GiB"], ["--memory"]),
        (["--context=1"], ["--context"]),
        (["--data.rollouts.taskss=3"], ["taskss"]),
        (["--model.policy.model=no/such/folder"], ["no/such/folder"]),
        (["--trainer.strategy=deepspeed_stage_2"], ["ZeroStrategy"]),
        (["--trainer.strategy=nonsense"], ["trainer.strategy", "nonsense"]),
        (["--data.minibatches=0"], ["data.minibatches"]),
    ],
)
def test_bad_input_ends_with_one_message(plan, arguments, names):
    status, text, _ = plan(*QUICKSTART, *arguments)
    assert status == 2
    assert "Traceback" not in text
    for name in names:
        assert name in text


def test_a_gpu_that_is_not_there_must_be_described(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, text, _ = plan(*QUICKSTART, "--trainer.accelerator=gpu")
    assert status == 2
    assert "--memory 80GiB" in text


def test_amounts_and_optimizers():
    assert [parse_bytes(text) for text in ("80GiB", "64 GB", "1.5e9", "2tib")] == [
        80 << 30,
        64 * 10**9,
        15 * 10**8,
        2 << 40,
    ]
    assert state_per_parameter(lambda parameters: AdamW(parameters, lr=0.1)) == 2
    assert state_per_parameter(lambda parameters: SGD(parameters, lr=0.1)) == 0
    assert state_per_parameter(lambda parameters: SGD(parameters, lr=0.1, momentum=0.9)) == 1

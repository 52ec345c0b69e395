"""The measurement behind ``spear plan``: real processes agree with the formulas; the tables of scaling are written."""

from __future__ import annotations

import json

import memory
import pytest
import scaling
import torch
from measuring.counters import MessageCounter, SavedActivations, storage_bytes
from measuring.training import Case

SMALL = {**memory.MODEL, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "vocab_size": 2048}


@pytest.mark.slow
def test_two_ranks_of_zero_2_agree_with_the_formulas():
    case = Case("small", "zero-2", precision="bf16-true", model=SMALL, row_tokens=32, bucket=200_000)
    figures = memory.measure(case)
    assert {figure.name: round(figure.ratio, 2) for figure in figures if not figure.agrees} == {}
    assert {"parameters", "gradients", "optimizer", "activations", "messages of an update"} <= {f.name for f in figures}


def test_storages_and_saved_activations_count_once():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    assert storage_bytes([weight, weight.view(16), weight[:1], None]) == 64
    saved = SavedActivations([weight])
    inputs = torch.ones(3, 4, requires_grad=True)
    with saved.watching():
        ((inputs @ weight).exp() * inputs).sum().backward()
    assert saved.total == 2 * 48, "the input, saved twice, and the exponential; not the weight"
    with MessageCounter() as counter:
        inputs + 1
    assert not counter.bytes


def test_scaling_writes_tables_and_a_picture(tmp_path, monkeypatch):
    small = {**scaling.MODELS["Qwen2.5-7B"], "num_hidden_layers": 2}
    monkeypatch.setattr(scaling, "MODELS", {"small": small, "smaller": {**small, "num_hidden_layers": 1}})
    scaling.main(["--output", str(tmp_path), "--picture", str(tmp_path / "scaling.png")])
    assert "| 64 | 512 |" in (tmp_path / "scaling.md").read_text()
    assert json.loads((tmp_path / "scaling.json").read_text())["models"]["small"]["peaks"]["ZeRO-3"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")

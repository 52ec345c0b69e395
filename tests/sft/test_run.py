from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spear_lightning.environments.alfworld.suite import ALFWorld
from spear_lightning.environments.expert import DemonstrationNoise
from spear_lightning.sft.demonstrations import ExpertDemonstrations
from spear_lightning.sft.evaluation import HeldOut
from spear_lightning.sft.module import Optimization
from spear_lightning.sft.run import SFTResult, sft

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
}


def miniature(suite: ALFWorld, folder: Path, **changes: Any) -> SFTResult:
    settings: dict[str, Any] = {
        "demonstrations": ExpertDemonstrations(noise=DemonstrationNoise(shuffle=False)),
        "model": TINY,
        "optimization": Optimization(epochs=1),
        "held_out": HeldOut(tasks=4, temperatures=(), max_turns=3),
        "workers": 1,
        "threads": 1,
    }
    return sft(suite, str(folder), **{**settings, **changes})


@pytest.mark.slow
def test_writes_a_folder_that_hugging_face_loads(suite: ALFWorld, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    result = miniature(suite, folder, held_out=HeldOut(tasks=4, temperatures=(1.0,), max_turns=3))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert [score.success.episodes for score in result.scores] == [4]
    card = (folder / "README.md").read_text()
    assert "seed 0" in card
    assert " won games of SearchExpert" in result.demonstrations
    assert result.demonstrations in card
    assert json.loads((folder / "scores.json").read_text())[0]["success"]["episodes"] == 4
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(suite: ALFWorld, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        miniature(suite, tmp_path / name, seed=seed)
    one, again, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "again", "other")
    )
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_bad_settings_are_named_and_nothing_is_written(suite: ALFWorld, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output"):
        miniature(suite, tmp_path / "file")
    with pytest.raises(ValueError, match="workers"):
        miniature(suite, tmp_path / "policy", workers=0)
    with pytest.raises(ValueError, match=r"model\.hidden_dim"):
        miniature(suite, tmp_path / "policy", model={**TINY, "hidden_dim": 3})
    with pytest.raises(ValueError, match=r"demonstrations\.max_steps"):
        miniature(suite, tmp_path / "policy", demonstrations=ExpertDemonstrations(max_steps=1))
    assert not (tmp_path / "policy").exists()

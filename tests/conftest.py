"""Fixtures that several tests share: a word-level tokenizer and tiny policies with random weights, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spear_lightning.policy.policy import Policy

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

WORDS = [
    *(
        "<pad>",
        "<eos>",
        "<unk>",
        "<task>",
        "</task>",
        "<obs>",
        "</obs>",
        "<action>",
        "</action>",
        "<think>",
        "</think>",
    ),
    *("put", "a", "apple", "mug", "plate", "in", "on", "the", "desk", "shelf", "fridge", "drawer", "1", "2", "3", "4"),
    *("go", "to", "take", "from", "open", "close", "look", "you", "see", "nothing", "happens", ".", ",", ":"),
]

TINY_MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    },
}
"""Wide initial weights make distributions that are far from uniform, so that a wrong position or mask shows."""


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a word-level tokenizer with padding, end-of-sequence and tag tokens."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tags = [word for word in WORDS if word.startswith("<")]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=tags[3:],
    )
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_policy(tiny_tokenizer: str) -> Callable[..., Policy]:
    """Makes policies: ``tiny_policy("qwen2" | "llama", seed=…, dtype=…, lora=…, config={changes} | replace={all})``."""

    def make(
        kind: str = "qwen2",
        config: dict[str, Any] | None = None,
        replace: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Policy:
        model = replace or {**TINY_MODELS[kind], **(config or {})}
        return Policy(config=model, tokenizer=tiny_tokenizer, **settings)

    return make


@pytest.fixture
def tiny_model_folder(tiny_policy: Callable[..., Policy], tmp_path: Path) -> str:
    """A Hugging Face folder with a tiny Qwen2 and its tokenizer."""
    tiny_policy().save_pretrained(tmp_path / "tiny-model")
    return str(tmp_path / "tiny-model")

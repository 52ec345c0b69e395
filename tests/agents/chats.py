"""Small tokenizers with real chat templates."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spear_lightning.agents.base import Ids

TEMPLATES = Path(__file__).parent / "templates"
# Two bytes to a token where these follow each other, so that one text has many tokenisations.
_MERGES = [("t", "h"), ("i", "n"), ("e", "r"), ("a", "n"), ("1", "0"), ("{", '"'), ("Ġ", "="), ("o", "o"), ("l", "l")]
_SPECIALS = {
    "qwen2.5": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    ),
}
_ENDS = {"qwen2.5": "<|im_end|>", "llama3": "<|eot_id|>"}


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, the special tokens and the chat template of a family of models."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in _MERGES)]
    backend = Tokenizer(BPE(vocab={name: number for number, name in enumerate(names)}, merges=_MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIALS[family]))
    if family == "qwen2.5":
        backend.add_tokens(["<tool_call>", "</tool_call>"])  # as there: tokens, but not special ones
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_ENDS[family],
        pad_token=_SPECIALS[family][0],
        bos_token=None if family == "qwen2.5" else "<|begin_of_text|>",
    )
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return tokenizer


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: Any, generate: bool) -> str:
    """What the template makes of a whole conversation."""
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate))


def drawn(tokenizer: PreTrainedTokenizerFast, text: str, rng: random.Random) -> Ids:
    """Ids that decode to ``text``, cut into tokens at random: mostly not those that encoding the text gives."""
    ids: list[int] = []
    while text:
        cut = rng.randint(1, 12)
        ids += tokenizer.encode(text[:cut], add_special_tokens=False)
        text = text[cut:]
    return np.asarray(ids, np.int32)

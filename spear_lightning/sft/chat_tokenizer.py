"""A small byte-level tokenizer with a chat template of few tokens, for models that are trained from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spear_lightning.environments.tools import CALL_TAGS

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")

# A large model has to be told what a tool does and how calls are written; one that is made for its tools need not be.
TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }}{% if not loop.last %} {% endif %}"
    "{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_chat_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that can spell any text, and spells these shortly; each digit is a token of its own.

    Args:
        texts: to find frequent pieces in.
        size: of the vocabulary.

    Returns:
        A fast Hugging Face tokenizer with a chat template.

    Raises:
        ValueError: ``size`` has no room for all bytes.
    """
    specials = [PAD, END, "<|tools|>", *(f"<|{role}|>" for role in ROLES)]
    least = 256 + len(specials) + len(CALL_TAGS)
    if size < least:
        raise ValueError(f"the vocabulary must have at least {least} entries, not {size}")
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size - len(CALL_TAGS),
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in CALL_TAGS])
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer

"""Tokenizers and a deterministic engine that agents and collectors are tested with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.randomness import stream_seed, uniforms

TAGS = ["<task>", "<obs>", "<action>", "</action>", "<think>", "</think>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if opened %}{{ opened }}{% endif %}{% endif %}"
)


def byte_tokenizer(chat: bool = False, tags: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte: can spell anything, like the byte-level tokenizers of large models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={character: number for number, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", *(TAGS if tags else [])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def word_tokenizer(words: Sequence[str], tags: Sequence[str] = TAGS) -> PreTrainedTokenizerFast:
    """One token per word; other words are unknown."""
    names = ["<pad>", "<eos>", "<unk>", *tags, *words]
    backend = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<eos>", "<unk>", *tags])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


class ScriptedEngine(RolloutEngine):
    """Says what a function of the prompt and one uniform number says; remembers what it was asked.

    Args:
        tokenizer: to write with.
        say: response text from the prompt's text and a number in [0, 1); ``None`` leaves no room.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, say: Callable[[str, float], str | None]) -> None:
        self.tokenizer = tokenizer
        self.say = say
        self.calls: list[list[Request]] = []
        self.ended: list[str] = []
        self.closed = False

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        assert len({request.session for request in requests}) == len(requests)
        self.calls.append(list(requests))
        return [self._complete(request) for request in requests]

    def _complete(self, request: Request) -> Completion:
        text = self.say(self.tokenizer.decode(request.prompt_ids.tolist()), float(uniforms(request.seed, 1)[0]))
        ids = [] if text is None else self.tokenizer.encode(text, add_special_tokens=False)
        cut = ids[: request.sampling.max_new_tokens]
        stopped = bool(cut) and cut[-1] in request.sampling.stop_ids
        # Log-probabilities that depend on everything: what comes of one episode must not reach into another.
        logps = -uniforms(stream_seed("logps", request.seed, *request.prompt_ids.tolist()), len(cut))
        return Completion(
            ids=np.asarray(cut, np.int32),
            logps=logps.astype(np.float32),
            entropies=(-logps / 2).astype(np.float32),
            finish="stop" if stopped else "length",
            weight_version=7,
        )

    def sync(self, policy: Policy, version: int) -> None: ...

    def end(self, session: str) -> None:
        self.ended.append(session)

    def close(self) -> None:
        self.closed = True

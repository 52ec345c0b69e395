"""A small word-level tokenizer for a text world: whole phrases and "noun number" names are single tokens.

Copying the right name out of a long transcript is most of what an agent does in such a world. When ``desk 1`` is one
token, copying it is one attention step, which a two-layer network learns within minutes.

Nothing is lost silently: text outside the vocabulary falls back to its UTF-8 bytes. Decoding gives back the text in
canonical form: in lower case, and with exactly one space before each piece of text and each tag.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spear_lightning.environments.alfworld.expert import ALFWORLD_PHRASES

TAGS = ("<task>", "<obs>", "<action>", "</action>", "<think>", "</think>")
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

_END = ""  # key of what must follow a unit, in a trie's node
_LISTS = (", and a", ", and an", ", and", ", a", ", an", ",", ".", ":", "'s")
_NAME = re.compile(r"(?<![a-z0-9])([a-z]+) ([1-9]\d?)(?![a-z0-9])")
_WORD = re.compile(r"(?<![a-z0-9])[a-z]+(?![a-z0-9])")


def build_tokenizer(
    texts: Iterable[str],
    *,
    phrases: Sequence[str] = ALFWORLD_PHRASES,
    names: bool = True,
    min_count: int = 2,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer from the texts that an agent reads and writes.

    Args:
        texts: observations, tasks and actions to collect words and names from.
        phrases: each becomes one token.
        names: whether a word and the number after it make one token ("desk 3").
        min_count: words seen less often are spelled in bytes. Names ("desk 3") count for their noun: with a noun come
            all its numbers up to the largest one seen.

    Returns:
        A fast Hugging Face tokenizer with pad, eos and unk token, which ``save_pretrained`` writes in the usual form.

    Raises:
        ValueError: the texts hold no words.
    """
    words, numbers = _survey(texts)
    kept = sorted(word for word, count in words.items() if count >= min_count)
    if not kept:
        raise ValueError("No words to build a tokenizer from: the texts are empty, or `min_count` is too large.")
    named = sorted(kind for kind in numbers if names and words[kind] >= min_count)
    numbered = [f"{kind} {n}" for kind in named for n in range(1, numbers[kind] + 1)]
    digits = [str(n) for n in range(max(20, *numbers.values()) + 1)] if numbers else []
    spaced = [f" {unit}" for unit in dict.fromkeys([*phrases, *numbered, *kept, *digits])]
    units = list(dict.fromkeys([*_LISTS, *spaced]))

    specials = [PAD, EOS, UNK, *TAGS]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    vocabulary = {token: number for number, token in enumerate([*specials, *bytes_, *units])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNK, byte_fallback=True, ignore_merges=True))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\A(?! )"), " "),
            normalizers.Replace(Regex(r" \z"), ""),
        ]
    )
    # Plain words are not listed: a long pattern is slow, and one that is not in the vocabulary is spelled in bytes all
    # the same.
    words_alone = {f" {word}" for word in kept}
    pattern = splitting_pattern(unit for unit in units if unit not in words_alone)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Sequence(
        [
            *(decoders.Replace(tag, f" {tag}") for tag in specials),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=list(TAGS),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    return tokenizer


def _survey(texts: Iterable[str]) -> tuple[Counter[str], dict[str, int]]:
    """Count words, and find the largest number that each noun is followed by."""
    words: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    for text in texts:
        lower = text.lower()
        words.update(_WORD.findall(lower))
        for kind, number in _NAME.findall(lower):
            numbers[kind] = max(numbers.get(kind, 0), int(number))
    return words, numbers


def splitting_pattern(units: Iterable[str]) -> str:
    """A regular expression that matches the longest of ``units`` at a place, else a word, else a character.

    A unit must not end inside a word ("desk 1" in "desk 12"). What is no unit goes on alone, character by character, so
    that text which spells a byte token ("<0x41>") is not taken for it.

    Units share their beginnings, as in a trie: tried one after the other at every place of a prompt, they take several
    times as long.
    """
    root: dict[str, Any] = {}
    for unit in units:
        node = root
        for character in unit:
            node = node.setdefault(character, {})
        node[_END] = r"(?![a-z0-9])" if unit[-1].isalnum() else ""
    return "|".join([*([_branch(root)] if root else []), r" [a-z]+(?![a-z0-9])", r"[\s\S]"])


def _branch(node: dict[str, Any]) -> str:
    """What may follow in a trie; the end of a unit comes last, so that the longest one matches."""
    longer = [re.escape(character) + _branch(node[character]) for character in sorted(node.keys() - {_END})]
    ways = [*longer, node[_END]] if _END in node else longer
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.sft.tokenizer import TAGS, build_tokenizer, splitting_pattern

TEXTS = [
    "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, you see "
    "a bed 1, an armchair 3, a desk 2, and a desk 1.\n\nYour task is to: put some pen on dresser.",
    "You arrive at desk 1. On the desk 1, you see a pen 1, and a creditcard 2.",
    "You pick up the pen 1 from the desk 1.",
    "take pen 1 from desk 1",
    "put some pen on dresser.",
    "put a pen in desk.",
    "Nothing happens.",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_phrases_and_names_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "<action> go to desk 1 </action>"))
    assert tokens == ["<action>", " go to", " desk 1", "</action>"]
    arrived = tokenizer.convert_ids_to_tokens(encode(tokenizer, "You arrive at desk 2."))
    assert arrived == [" you arrive at", " desk 2", "."]


def test_numbers_can_stand_alone() -> None:
    tokenizer = build_tokenizer(TEXTS, names=False)
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "go to desk 1"))
    assert tokens == [" go to", " desk", " 1"]


def test_a_word_that_was_never_seen_is_spelled_out(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "desk xyz desk"))
    assert tokens == [" desk", "<0x20>", "<0x78>", "<0x79>", "<0x7A>", " desk"]


def test_a_name_is_never_cut_out_of_a_longer_one(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(encode(tokenizer, "desk 12 penguin"))
    assert tokens[:2] == [" desk", " 12"]
    assert " pen" not in tokens


@pytest.mark.parametrize("text", TEXTS)
def test_engine_texts_come_back_in_lower_case(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text.lower()


def test_a_transcript_comes_back_with_its_tags(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<task> put some pen on desk. <obs> you see a desk 1. <action> go to desk 1 </action> <obs> nothing happens."
    assert tokenizer.decode(encode(tokenizer, text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="<>/0x41aAdesk 1\n\t.,", max_size=60))
def test_no_text_is_lost(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(tokenizer, text)
    assert tokenizer.unk_token_id not in ids
    # Lowering is done character by character, so a final sigma stays a plain one.
    lowered = "".join(character.lower() for character in text)
    canonical = lowered.removeprefix(" ")
    assert tokenizer.decode(ids) in (canonical, canonical.removesuffix(" "))


def test_text_that_spells_a_byte_token_stays_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(encode(tokenizer, "a <0x41> b")) == "a <0x41> b"


def test_a_saved_tokenizer_loads_and_serves_the_agent(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    agent = TranscriptAgent()
    agent.bind(loaded)
    ids = agent.response_ids("take pen 1 from desk 1")
    assert ids.tolist() == encode(tokenizer, "<action> take pen 1 from desk 1 </action>")
    assert ids[-1] in agent.stop_ids
    assert agent.interpret(ids, ()).action == "take pen 1 from desk 1"
    assert loaded.pad_token_id != loaded.eos_token_id
    assert all(len(encode(loaded, tag)) == 1 for tag in TAGS)


def test_nothing_to_learn_words_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="min_count"):
        build_tokenizer(["", "!"])


UNITS = (", and a", ", and", ",", " desk 1", " desk 12", " desk", " go to", " go to the", " a.", " a")


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*UNITS, " ", "1", "x", " b", "\n", "."]), max_size=12).map("".join))
def test_the_pattern_takes_the_longest_unit_as_trying_all_of_them_does(text: str) -> None:
    longest_first = sorted(UNITS, key=len, reverse=True)
    tried = (re.escape(unit) + (r"(?![a-z0-9])" if unit[-1].isalnum() else "") for unit in longest_first)
    plain = "|".join([*tried, r" [a-z]+(?![a-z0-9])", r"[\s\S]"])
    assert re.findall(splitting_pattern(UNITS), text) == re.findall(plain, text)

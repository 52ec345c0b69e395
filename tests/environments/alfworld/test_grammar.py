"""Parsed once, and still what TextWorld would have parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alfworld.info import ALFRED_TWL2_PATH
from textworld.envs.pddl import logic, textgen

from spear_lightning.environments.alfworld.grammar import LogicParser, Parses, SharedGrammar

CONTEXT: dict[str, Any] = {"state": None, "facts": [], "variables": {}, "mapping": {}, "entity_infos": {}}
BASE = Path(ALFRED_TWL2_PATH).read_text()
INSTRUCTIONS = (
    "put a mug in shelf",
    "Put the  mug's  handle, in 2.5 bar-s. ",
    " leading",
    "a; b",
    "a: b!",
    'a \\"quoted\\" word',
    "café & bar",
    "what? 1.",
    "UNKNOWN GOAL",
)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_the_instruction_reads_as_in_textworld(instruction: str) -> None:
    parser = LogicParser(Parses())
    parser.parse(BASE.replace("UNKNOWN GOAL", "an instruction parsed before"))
    text = BASE.replace("UNKNOWN GOAL", instruction)
    _, stock = logic._parse_and_convert(text, rule_name="pddlStart")
    assert parser.parse(text).grammar.derive("#task#", CONTEXT) == stock.derive("#task#", CONTEXT)


def test_games_do_not_see_each_others_instruction() -> None:
    parser = LogicParser(Parses())
    first, second = (parser.parse(BASE.replace("UNKNOWN GOAL", f"do {word}")) for word in ("this", "that"))
    assert first.grammar.derive("#task#", CONTEXT) == "Your task is to: do this."
    assert second.grammar.derive("#task#", CONTEXT) == "Your task is to: do that."
    assert first.types is not second.types


def test_an_unknown_symbol_is_an_error_as_in_textworld() -> None:
    with pytest.raises(textgen.CSGUnknownSymbolError, match="nowhere"):
        SharedGrammar({}, Parses()).derive("#nowhere#", CONTEXT)

"""Parsed once, and still what TextWorld would have parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alfworld.info import ALFRED_TWL2_PATH
from textworld.envs.pddl import logic, textgen
from textworld.generator.game import EntityInfo
from textworld.logic import GameLogic, Proposition, State, Type, TypeHierarchy

from spear_lightning.environments.alfworld.grammar import SharedGrammar, parse_logic

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
    parse_logic(BASE.replace("UNKNOWN GOAL", "an instruction parsed before"))
    text = BASE.replace("UNKNOWN GOAL", instruction)
    _, stock = logic._parse_and_convert(text, rule_name="pddlStart")
    assert parse_logic(text).grammar.derive("#task#", CONTEXT) == stock.derive("#task#", CONTEXT)


def rooms() -> dict[str, Any]:
    """Two boxes, one with two things in it, and a derivation context in which nothing is bound."""
    types = TypeHierarchy()
    types.add(Type("box", []))
    types.add(Type("thing", []))
    state = State(GameLogic())
    state._logic.types = types
    state.add_facts(
        Proposition.parse(fact)
        for fact in (
            "in(pen: thing, red: box)",
            "in(cup: thing, red: box)",
            "open(red: box)",
            "at(red: box)",
            "at(tin: box)",
        )
    )
    infos = {name: EntityInfo(name, "thing") for name in ("pen", "cup", "red", "tin")}
    for info in infos.values():
        info.name = info.id
    return {**CONTEXT, "state": state, "entity_infos": infos}


RULES = {
    "all": "[{#box(b)# | at(b:box)}]",
    "box(b)": "{b.name.upper()}: #content(b)#",
    "content(b)": [
        {"condition": "open(b:box) & in(t:thing, b:box)", "rhs": "[{t.name | in(t:thing, b:box)}]"},
        {"rhs": "[{t.name | in(t:thing, b:box)}] behind a lid"},
    ],
    "pairs": "[{t.name + u.name | in(t:thing, b:box) & in(u:thing, b:box)}]",
    "list_empty": "nothing",
    "list_separator": ", ",
    "list_last_separator": ", and ",
}


@pytest.mark.parametrize("start", ["#all#", "#pairs#", "see {1 + 1} [{b.name | at(b:box)}] now", "plain"])
def test_nested_queries_read_as_in_textworld(start: str) -> None:
    rules = {name: rule if isinstance(rule, list) else [{"rhs": rule}] for name, rule in RULES.items()}
    stock = textgen.ContextSensitiveGrammar.parse(json.dumps(rules))
    derived = SharedGrammar(dict(stock._rules)).derive(start, rooms())
    assert derived == stock.derive(start, rooms())
    if start == "#all#":
        assert derived == "RED: cup, and pen, and TIN: nothing behind a lid"


def test_games_do_not_see_each_others_instruction() -> None:
    first, second = (parse_logic(BASE.replace("UNKNOWN GOAL", f"do {word}")) for word in ("this", "that"))
    assert first.grammar.derive("#task#", CONTEXT) == "Your task is to: do this."
    assert second.grammar.derive("#task#", CONTEXT) == "Your task is to: do that."
    assert first.types is not second.types


def test_an_unknown_symbol_is_an_error_as_in_textworld() -> None:
    with pytest.raises(textgen.CSGUnknownSymbolError, match="nowhere"):
        SharedGrammar({}).derive("#nowhere#", CONTEXT)

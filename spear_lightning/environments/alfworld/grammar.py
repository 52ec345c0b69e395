"""TextWorld's context-sensitive grammar without its copies: the same text, a hundred times less work.

Stock TextWorld parses each text again at every use and deep-copies all bound variables at every expanded symbol. Here
each text is parsed once (by TextWorld's own parser) and contexts are shared, since no expansion changes them. The
result is compared with the stock engine's, transcript by transcript, in the tests.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from textworld.envs.pddl import logic as pddl_logic
from textworld.envs.pddl import textgen
from textworld.logic import Rule, TypeHierarchy

Context = dict[str, Any]
"""TextWorld's derivation context: ``state``, ``facts``, ``variables``, ``mapping`` and ``entity_infos``."""


# What TextWorld's parsers made of a text is remembered, for all games of a process.
@functools.cache
def _symbols(text: str) -> tuple[Any, ...]:
    return tuple(textgen._parse_and_convert(text, rule_name="symbols"))


@functools.cache
def _query(text: str) -> Any:
    """The conjunctive query of a condition, as a TextWorld rule."""
    return Rule.parse_conjunctive_query(text)


@functools.cache
def _code(text: str) -> CodeType:
    """The compiled expression between braces."""
    return compile(text.strip(), "<grammar>", "eval")


_SEPARATORS = _LIST_EMPTY, _LIST_SEPARATOR, _LIST_LAST = tuple(
    textgen.NonterminalSymbol(name) for name in ("list_empty", "list_separator", "list_last_separator")
)


@dataclass(frozen=True, slots=True)
class Reads:
    """What a template's text depends on.

    Attributes:
        predicates: names of the facts it asks for.
        placeholders: name and type of each variable of its queries.
        names: variables that its expressions read.
    """

    predicates: frozenset[str]
    placeholders: frozenset[tuple[str, str]]
    names: frozenset[str]


class SharedGrammar:
    """A parsed grammar that derives texts as :class:`textworld.envs.pddl.textgen.ContextSensitiveGrammar` does.

    Args:
        rules: production rules by left-hand side, as TextWorld parsed them.
    """

    def __init__(self, rules: dict[str, list[Any]]) -> None:
        self._rules = rules

    def derive(self, start: str, context: Context) -> str:
        """Expand a template.

        Args:
            start: template text, for example ``#look.feedback#``.
            context: state, bound variables and their mapping; left as it is.

        Returns:
            The text.

        Raises:
            textworld.envs.pddl.textgen.CSGUnknownSymbolError: the template names a symbol without a rule.
        """
        pending = [(symbol, context) for symbol in reversed(_symbols(start))]
        derived: list[str] = []
        while pending:
            symbol, context = pending.pop()
            if isinstance(symbol, textgen.TerminalSymbol):
                derived.append(str(symbol.symbol))
            elif isinstance(symbol, textgen.NonterminalSymbol):
                pending.extend((part, context) for part in reversed(self._expansion(symbol, context)))
            else:
                pending.extend(reversed(list(self._parts(symbol, context))))
        return "".join(derived)

    def reads(self, template: str) -> Reads | None:
        """What a template's text depends on, or ``None`` where only following production rules would tell."""
        predicates: set[str] = set()
        placeholders: set[tuple[str, str]] = set()
        names: set[str] = set()
        for symbol in _symbols(template):
            inner = symbol
            if isinstance(symbol, textgen.ListSymbol):
                if not all(self._is_plain(separator.symbol) for separator in _SEPARATORS):
                    return None
                inner = symbol.symbol
            if isinstance(inner, textgen.ConditionalSymbol):
                if inner.given:
                    for predicate in _query(inner.given).preconditions:
                        predicates.add(predicate.name.removeprefix("not_"))
                        placeholders.update((parameter.name, parameter.type) for parameter in predicate.parameters)
                inner = inner.expression
            if isinstance(inner, textgen.EvalSymbol):
                tree = ast.parse(inner.expression.strip(), mode="eval")
                names.update(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
            elif not isinstance(inner, textgen.TerminalSymbol):
                return None
        return Reads(frozenset(predicates), frozenset(placeholders), frozenset(names))

    def _is_plain(self, symbol: str) -> bool:
        """Whether a symbol always stands for the same words."""
        rules = self._rules.get(symbol, ())
        return len(rules) > 0 and not rules[0].condition and all(map(_is_terminal, rules[0].rhs))

    def _expansion(self, symbol: Any, context: Context) -> list[Any]:
        for rule in self._rules.get(str(symbol.symbol), ()):
            if not rule.condition or self._holds(rule.condition, context):
                return list(rule.rhs)
        raise textgen.CSGUnknownSymbolError(symbol)

    def _holds(self, condition: str, context: Context) -> bool:
        query = _query(condition)
        return next(iter(context["state"].all_assignments(query, context["mapping"])), None) is not None

    def _parts(self, symbol: Any, context: Context) -> Iterator[tuple[Any, Context]]:
        if isinstance(symbol, textgen.EvalSymbol):
            # Bound variables come first, then the module's names, as in stock TextWorld.
            value = eval(_code(symbol.expression), vars(textgen), context["variables"])
            yield textgen.TerminalSymbol(value), context
        elif isinstance(symbol, textgen.ConditionalSymbol):
            for bound in self._bindings(symbol.given, context) if symbol.given else (context,):
                yield symbol.expression, bound
        elif isinstance(symbol, textgen.ListSymbol):
            yield from _enumeration(list(self._parts(symbol.symbol, context)), context)
        else:
            raise NotImplementedError(f"unknown grammar symbol {type(symbol).__name__}")

    def _bindings(self, given: str, context: Context) -> Iterator[Context]:
        infos = context["entity_infos"]
        for mapping in context["state"].all_assignments(_query(given), context["mapping"]):
            variables = {placeholder.name: infos[variable.name] for placeholder, variable in mapping.items()}
            yield {
                **context,
                "variables": {**context["variables"], **variables},
                "mapping": {**context["mapping"], **mapping},
            }


def _is_terminal(symbol: Any) -> bool:
    return isinstance(symbol, textgen.TerminalSymbol)


def _enumeration(items: list[tuple[Any, Context]], context: Context) -> Iterator[tuple[Any, Context]]:
    """``a, b, and c``, with the separators that the grammar defines."""
    if not items:
        yield _LIST_EMPTY, context
    for number, item in enumerate(items):
        if number:
            yield (_LIST_LAST if number == len(items) - 1 else _LIST_SEPARATOR), context
        yield item


class Logic:
    """What a grammar text says: actions and production rules (as :class:`textworld.envs.pddl.logic.GameLogic`).

    Attributes:
        actions: action schemas by name, with command template and feedback rule.
        grammar: the grammar.
        types: TextWorld's type hierarchy; filled by the game's domain.
    """

    def __init__(self, actions: dict[str, Any], grammar: SharedGrammar) -> None:
        self.actions = actions
        self.grammar = grammar
        self.types = TypeHierarchy()


# The one place where ALFWorld's grammars differ from game to game, if the instruction is plain words.
_INSTRUCTION = re.compile(r'("rhs": "Your task is to: )([\w ,\'.-]+)(")')
_PLACEHOLDER = "UNKNOWN GOAL."


def parse_logic(text: str) -> Logic:
    """Parse a game's grammar, each text once; texts that differ only in the task's instruction count as one.

    Args:
        text: the ``grammar`` entry of a ``game.tw-pddl``.

    Returns:
        Its actions and grammar; the type hierarchy is empty and the caller's own.
    """
    found = _INSTRUCTION.findall(text)
    if len(found) != 1:
        actions, rules = _parsed(text)
        return Logic(actions, SharedGrammar(rules))
    actions, rules = _parsed(_INSTRUCTION.sub(rf"\g<1>{_PLACEHOLDER}\g<3>", text))
    return Logic(actions, SharedGrammar(_with_instruction(rules, found[0][1])))


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    actions, grammar = pddl_logic._parse_and_convert(text, rule_name="pddlStart")
    return actions, dict(grammar._rules)


def _with_instruction(rules: dict[str, list[Any]], instruction: str) -> dict[str, list[Any]]:
    return {name: [_filled(rule, instruction) for rule in alternatives] for name, alternatives in rules.items()}


def _filled(rule: Any, instruction: str) -> Any:
    if not any(_asks(symbol) for symbol in rule.rhs):
        return rule
    rhs = [
        textgen.TerminalSymbol(symbol.symbol.replace(_PLACEHOLDER, instruction)) if _asks(symbol) else symbol
        for symbol in rule.rhs
    ]
    return textgen.ProductionRule(lhs=rule.lhs, rhs=rhs, weight=rule.weight, condition=rule.condition)


def _asks(symbol: Any) -> bool:
    return _is_terminal(symbol) and _PLACEHOLDER in str(symbol.symbol)

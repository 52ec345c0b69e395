"""The real ALFWorld engine, made fast by exact caches.

Stock ALFWorld spends 45 ms a step and 250 ms a reset on work whose result it has had before. The classes here are
TextWorld's own with that work remembered: the translation to SAS+ (:mod:`.translation`), the parsed grammar
(:mod:`.grammar`), the facts of the initial state, and what each planner operator means in words. Nothing of TextWorld
or ALFWorld is patched, so a stock engine beside this one stays stock; transcripts of both are equal (tested).

Processes only: the translator is not thread-safe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import fast_downward
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
from textworld.core import GameState
from textworld.envs.pddl import PddlEnv
from textworld.envs.pddl.logic import Atom, PddlState
from textworld.logic import Action, Placeholder, Proposition, State, Type, Variable

from spear_lightning.environments.alfworld.games import read_game
from spear_lightning.environments.alfworld.grammar import Logic, parse_logic
from spear_lightning.environments.alfworld.planner_library import load_library
from spear_lightning.environments.alfworld.translation import (
    Translation,
    TranslationStore,
    UnsolvableGameError,
    translate_for_planning,
)


@dataclass
class LoadedGame:
    """A game ready to be started any number of times, by any number of environments of a process.

    Attributes:
        data: the game file's entries.
        logic: actions, grammar and types.
        translation: the SAS+ task and what comes with it.
        sas: its text as bytes.
        command_parameters: for each action whose command does not depend on the state, the positions of the arguments
            that it depends on.
        initial: facts of the initial state; filled by the first start.
        propositions: fact by the planner's name for it.
        operators: TextWorld action by operator number.
        commands: command by action and those arguments, for each assignment of names to entities.
    """

    data: Mapping[str, Any]
    logic: Logic
    translation: Translation
    sas: bytes
    command_parameters: dict[str, tuple[int, ...]]
    initial: State | None = None
    propositions: dict[str, Proposition] = field(default_factory=dict)
    operators: dict[int, Action] = field(default_factory=dict)
    commands: dict[tuple[str, ...], dict[tuple[str, ...], str]] = field(default_factory=dict)


class GameCache:
    """Recently loaded games of this process.

    Args:
        translations: folder of translations on disk, or ``None``.
        capacity: how many games stay in memory (about 1 MB each).
    """

    def __init__(self, translations: Path | None = None, capacity: int = 64) -> None:
        self._store = TranslationStore(translations)
        self.load = lru_cache(maxsize=capacity)(self._load)
        self._libraries: list[Any] = []

    def borrow_library(self) -> Any:
        """A copy of the planner for one environment: one given back before, or a new one."""
        return self._libraries.pop() if self._libraries else load_library()

    def return_library(self, library: Any) -> None:
        """Take back a copy of the planner that its environment no longer needs."""
        self._libraries.append(library)

    def _load(self, path: str) -> LoadedGame:
        """The game in the file ``path``.

        Raises:
            ValueError: the file is missing or is not a game; the message names it.
        """
        return self.prepare(read_game(Path(path)), path)

    def prepare(self, data: Mapping[str, Any], source: str = "game") -> LoadedGame:
        """Parse and translate a game.

        Args:
            data: entries of a game file.
            source: name of the file, for messages.

        Raises:
            ValueError: the grammar or the PDDL cannot be read, or the goal is out of reach; the message names
                ``source``.
        """
        try:
            logic = parse_logic(data["grammar"])
            translation = self._store.get(data["pddl_domain"], data["pddl_problem"])
        except UnsolvableGameError as error:
            raise UnsolvableGameError(f"{source}: this game cannot be played: {error}") from error
        except (Exception, SystemExit) as error:  # the translator ends the process on a syntax error
            raise ValueError(f"{source}: ALFWorld cannot read this game ({type(error).__name__}: {error})") from error
        for name, supertypes in translation.types:
            with contextlib.suppress(ValueError):  # declared twice: stock keeps the first too
                logic.types.add(Type(name, supertypes))
        return LoadedGame(data, logic, translation, translation.sas.encode(), _command_parameters(logic, translation))


def _command_parameters(logic: Logic, translation: Translation) -> dict[str, tuple[int, ...]]:
    """For each action whose command does not depend on the state: which of its arguments the command depends on."""
    fluents = set(translation.fluents)
    found = {}
    for name, parameters in translation.actions.items():
        reads = logic.grammar.reads(logic.actions[name].template) if name in logic.actions else None
        if reads is None or reads.predicates & fluents:
            continue
        every = tuple(range(len(parameters)))
        # A variable that the action leaves free takes any value that no argument has, so all arguments matter.
        bound = reads.placeholders <= set(parameters)
        read = reads.names | {placeholder for placeholder, _ in reads.placeholders}
        found[name] = tuple(number for number in every if parameters[number][0] in read) if bound else every
    return found


class CachedState(PddlState):  # type: ignore[misc]  # TextWorld is untyped
    """A game's current state: TextWorld's :class:`PddlState`, started from what is remembered of the game.

    Args:
        library: this environment's own copy of the planner.
        game: the game to start.
    """

    def __init__(self, library: Any, game: LoadedGame) -> None:
        # Deliberately not PddlState.__init__, which translates the game twice.
        self._logic = game.logic
        self._game = game
        self.downward_lib = library
        self.pddl_problem = game.data["pddl_problem"]
        self.name2type = game.translation.objects
        library.load_sas(game.sas)
        if game.initial is None:
            game.initial = self._initial_facts()
        initial = game.initial
        self._facts = initial._facts.copy()  # a defaultdict
        for signature, facts in self._facts.items():
            self._facts[signature] = facts.copy()
        self._vars_by_name = initial._vars_by_name.copy()
        self._vars_by_type = initial._vars_by_type.copy()
        for type_name, variables in self._vars_by_type.items():
            self._vars_by_type[type_name] = variables.copy()
        self._var_counts = initial._var_counts.copy()

    def _initial_facts(self) -> State:
        state = State(textworld.logic.GameLogic())
        state.add_facts(
            Proposition(predicate, [Variable(name, self.name2type[name]) for name in arguments])
            for predicate, arguments in self._game.translation.facts
        )
        atoms = (Atom * self.downward_lib.get_state_size())()
        self.downward_lib.get_state(atoms)
        facts = (self._proposition(atom) for atom in atoms)
        state.add_facts(fact for fact in facts if not fact.is_negation)
        return state

    def _proposition(self, atom: Atom) -> Proposition:
        name = atom.name
        found = self._game.propositions.get(name)
        if found is None:
            found = self._game.propositions[name] = atom.get_fact(self.name2type)
        return found

    def all_applicable_actions(self) -> list[Action]:
        """The actions that the state admits, each operator name once, in the planner's order."""
        operators = (fast_downward.Operator * self.downward_lib.get_applicable_operators_count())()
        self.downward_lib.get_applicable_operators(operators)
        self._operators = {operator.id: operator for operator in operators}
        actions, seen = [], set()
        for number, operator in self._operators.items():
            action = self._game.operators.get(number)
            if action is None:
                action = self._game.operators[number] = self._action(operator)
            if action.operator_name not in seen:
                seen.add(action.operator_name)
                actions.append(action)
        return actions

    def _action(self, operator: Any) -> Action:
        name, *arguments = operator.name.split()
        action = Action(name=name, preconditions=[], postconditions=[])
        action.id = operator.id
        action.operator_name = operator.name
        action.mapping = {
            Placeholder(parameter, type_name): Variable(argument, type_name)
            for (parameter, type_name), argument in zip(self._game.translation.actions[name], arguments, strict=False)
        }
        read = self._game.command_parameters.get(name)
        action.command_key = None if read is None else (name, *(arguments[number] for number in read))
        action.command_template = self._logic.actions[name].template
        action.feedback_rule = self._logic.actions[name].feedback_rule
        return action

    def apply(self, action: Action) -> list[Proposition]:
        """Carry out an applicable action; returns the facts it set."""
        operator = self._operators[action.id]
        effects = (Atom * operator.nb_effect_atoms)()
        self.downward_lib.apply_operator(operator.id, effects)
        changes = [self._proposition(effect) for effect in effects]
        for fact in changes:
            self.remove_fact(fact.negate())
            self.add_fact(fact)
        return changes

    def replan(self, infos: Mapping[str, Any]) -> list[str]:
        """The planner's shortest way to win from here, as commands; empty if there is none."""
        planning = translate_for_planning(self._game.data["pddl_domain"], self.pddl_problem)
        self.downward_lib.load_sas_replan(planning.encode())
        if not self.downward_lib.replan(False):
            return []
        operators = (fast_downward.Operator * self.downward_lib.get_last_plan_length())()
        self.downward_lib.get_last_plan(operators)
        commands = []
        for operator in operators:
            name, *arguments = operator.name.split()
            parameters = (parameter for parameter, _ in self._game.translation.actions[name])
            values = {p: infos[argument].name for p, argument in zip(parameters, arguments, strict=False)}
            # As stock: this one template is a query over the state.
            template = "go to {r}" if name == "gotolocation" else self._logic.actions[name].template
            commands.append(template.format(**values))
        return commands


class CachedPddlEnv(PddlEnv):  # type: ignore[misc]  # TextWorld is untyped
    """TextWorld's PDDL environment on :class:`CachedState`.

    Args:
        infos: what the game state should tell.
        cache: games of this process.
    """

    def __init__(self, infos: textworld.EnvInfos, cache: GameCache) -> None:
        # Not PddlEnv.__init__, which copies 34 MB for each environment; what it calls in its turn is called here.
        textworld.Environment.__init__(self, infos)
        self.downward_lib = cache.borrow_library()
        self._cache = cache
        self._started: CachedState | None = None

    def load(self, filename_or_data: str | Mapping[str, Any]) -> None:
        """Load a game.

        Args:
            filename_or_data: path of a ``game.tw-pddl``, or its entries (not remembered in memory then).

        Raises:
            ValueError: the file is missing or is not a game; the message names it.
        """
        if isinstance(filename_or_data, str):
            self._game = self._cache.load(filename_or_data)
        else:
            self._game = self._cache.prepare(filename_or_data)
        self._game_data = self._game.data
        self.walkthrough = self._game_data.get("walkthrough")
        self._logic = self._game.logic
        self._pddl_state = self._started = CachedState(self.downward_lib, self._game)
        self._entity_infos = self._get_entity_infos()

    def reset(self) -> GameState:
        """Start the loaded game from the beginning."""
        # The state made by `load` is still untouched at the first reset.
        self._pddl_state = self._started or CachedState(self.downward_lib, self._game)
        self._started = None
        names = tuple(info.name for info in self._entity_infos.values())
        self._commands = self._game.commands.setdefault(names, {})
        self.prev_state = None
        self.state = GameState()
        self._last_action = None
        self._moves = 0
        self.state.feedback = self._logic.grammar.derive("#intro#", self._context({}))
        self.state.raw = self.state.feedback
        self._gather_infos()
        if "walkthrough" in self.request_infos.extras:
            self.state["extra.walkthrough"] = self.walkthrough or self._pddl_state.replan(self._entity_infos)
        return self.state

    def _context(self, mapping: Mapping[Placeholder, Variable]) -> dict[str, Any]:
        return {
            "state": self._pddl_state,
            "facts": self._pddl_state.facts,
            "variables": {placeholder.name: self._entity_infos[var.name] for placeholder, var in mapping.items()},
            "mapping": mapping,
            "entity_infos": self._entity_infos,
        }

    def _command(self, action: Action) -> str:
        key = action.command_key
        command = self._commands.get(key) if key else None
        if command is None:
            command = str(self._logic.grammar.derive(action.command_template, self._context(action.mapping)))
            if key:
                self._commands[key] = command
        return command

    def _gather_infos(self) -> None:
        state = self.state
        state["won"] = self._pddl_state.check_goal()
        state["lost"] = False
        state["_entity_infos"] = self._entity_infos
        state["last_action"] = None
        state["_last_action"] = self._last_action
        if self.request_infos.facts:
            state["_facts"] = list(self._pddl_state.facts)
            state["facts"] = list(map(self._get_human_readable_fact, state["_facts"]))
        state["_valid_actions"] = self._pddl_state.all_applicable_actions()
        state["_valid_commands"] = [self._command(action) for action in state["_valid_actions"]]
        state["admissible_commands"] = sorted(set(state["_valid_commands"]))
        if self.request_infos.moves:
            state["moves"] = self._moves
        if self.request_infos.policy_commands:
            state["policy_commands"] = self._pddl_state.replan(self._entity_infos)

    def close(self) -> None:
        """Give this environment's copy of the planner back; the environment cannot be used any more."""
        library, self.downward_lib = getattr(self, "downward_lib", None), None
        if library is not None:
            self._cache.return_library(library)


def make_engine(cache: GameCache, infos: textworld.EnvInfos | None = None) -> AlfredInfos:
    """ALFWorld's own stack of wrappers around :class:`CachedPddlEnv`.

    Args:
        cache: games of this process; share one among all its environments.
        infos: what the game state should tell; default: whether the game is won, and the admissible commands.

    Returns:
        A TextWorld environment: ``load(path)``, ``reset()``, ``step(command)``.
    """
    infos = infos or textworld.EnvInfos(won=True, admissible_commands=True)
    return AlfredInfos(AlfredDemangler(CachedPddlEnv(infos, cache)))


def solve(cache: GameCache, games: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Fast Downward's planner, as TextWorld uses it, proves that games can be won.

    Args:
        cache: where translations are kept.
        games: entries of game files.

    Yields:
        Commands that win each game from its start; none if it cannot be won.
    """
    with contextlib.closing(make_engine(cache, textworld.EnvInfos(policy_commands=True))) as engine:
        for game in games:
            try:
                engine.load(game)
            except UnsolvableGameError:  # noqa: PERF203 - a game takes far longer
                yield []
            else:
                yield list(engine.reset()["policy_commands"])

"""Games of TextWorld's challenges on disk: each made once for a machine, whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

from spear_lightning.environments.base import Split, first_seed, require, show_progress
from spear_lightning.utils.atomic import make_once

Challenge = Literal["coin_collector", "treasure_hunter", "cooking", "simple"]
CHALLENGES: tuple[str, ...] = get_args(Challenge)
GAME_FILE = "game.z8"
MOST_GAMES = 1_000_000  # in a split
_FORMAT = 1  # raise when games of equal settings come out differently
_TRIES = 50  # a map may have no room for a quest of the asked length, one in four in the worst case seen
_PARALLEL_FROM = 8  # games; a process takes seconds to start, as long as a game takes to make


@dataclass(frozen=True)
class GameFolder:
    """The games of one challenge and settings, any number of them.

    Attributes:
        root: the folder is made here.
        challenge: one of :data:`CHALLENGES`.
        settings: the challenge's own options.
        grammar: options of the text generation.
    """

    root: Path
    challenge: str
    settings: Mapping[str, Any]
    grammar: Mapping[str, Any]

    @cached_property
    def path(self) -> Path:
        """The folder: a digest of all that decides the games but their seeds, so that games can be added.

        Raises:
            ValueError: TextWorld is not installed.
        """
        require("TextWorld", "alfworld", {"textworld": "textworld"})
        key = [_FORMAT, version("textworld"), self.challenge, self.settings, self.grammar]
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True, default=str).encode(), digest_size=8)
        return self.root / f"{self.challenge}-{digest.hexdigest()}"

    def make_all(self, split: Split, count: int) -> list[str]:
        """Make the first ``count`` games of ``split`` that are not there yet.

        Returns:
            Their names; ``path/name/GAME_FILE`` is the game.

        Raises:
            ValueError: TextWorld is not installed, does not take the settings, or the folder cannot be written.
        """
        names = [f"{split}-{number}" for number in range(count)]
        missing = [name for name in names if not (self.path / name / GAME_FILE).exists()]
        try:
            # What is wrong with the settings is found with the first game, before processes are started.
            alone = missing[: 1 if len(missing) > _PARALLEL_FROM else None]
            for name in alone:
                self.make(name)
            if len(missing) > len(alone):
                self._make_together(missing[len(alone) :], f"TextWorld {split} games")
        except OSError as error:
            raise ValueError(f"cannot write TextWorld games under {self.path} ({error}): set cache_dir") from error
        return names

    def _make_together(self, names: list[str], label: str) -> None:
        workers = min(os.cpu_count() or 1, 16)
        # Spawned, not forked: the caller may hold threads. Processes, not threads: the generator has global state.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                for _ in show_progress(pool.map(self.make, names), len(names), label):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)  # the games made so far stay; no more are begun
                raise

    def make(self, name: str) -> None:
        """Make one game unless it is there.

        Args:
            name: split and number, as :meth:`make_all` returns them.

        Raises:
            ValueError: TextWorld does not take the settings.
            OSError: the folder cannot be written.
        """
        split, _, number = name.partition("-")
        seed = first_seed(cast(Split, split)) + int(number)
        make_once(self.path, name, GAME_FILE, partial(self._write, seed))

    def _write(self, seed: int, folder: Path) -> None:
        from textworld import GameOptions
        from textworld.challenges import CHALLENGES as MAKERS
        from textworld.generator import QuestGenerationError, compile_game
        from textworld.generator.text_grammar import GrammarOptions

        try:
            unknown = sorted(set(self.grammar) - set(GrammarOptions.__slots__))
            if unknown:
                raise ValueError(f"grammar has no {unknown[0]!r}; it has {', '.join(GrammarOptions.__slots__)}")
            settings = _checked(MAKERS[f"tw-{self.challenge}"][2], self.settings)
            # The seeds of further tries lie beyond the largest split, so no two games share one.
            for seed_of_try in range(seed, seed + _TRIES * MOST_GAMES, MOST_GAMES):
                options = GameOptions()
                options.grammar = GrammarOptions(**self.grammar)
                options.seeds, options.path = seed_of_try, str(folder / GAME_FILE)
                try:
                    game = MAKERS[f"tw-{self.challenge}"][1](settings, options)
                except QuestGenerationError:
                    continue
                (folder / compile_game(game, options)).with_suffix(".ni").unlink()  # the source is not played
                return
            raise ValueError(f"none of {_TRIES} maps has room for a quest of this length")
        except OSError:
            raise
        except Exception as error:  # assertions, name errors: whatever a challenge finds wrong with its settings
            given = {"settings": dict(self.settings), "grammar": dict(self.grammar)}
            raise ValueError(f"TextWorld cannot make a {self.challenge} game with {given}: {error}") from error


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({' '.join(self.format_usage().split())})")


def _checked(add_arguments: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with defaults, as the challenge's own command-line options read them: they know names and types."""
    parser = _Options(prog="options:", add_help=False, allow_abbrev=False)
    add_arguments(parser)
    flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    chosen = {flag: value for flag, value in flags.items() if value is not None and value is not False}
    return vars(parser.parse_args([flag if value is True else f"{flag}={value}" for flag, value in chosen.items()]))

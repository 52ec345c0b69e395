"""The examples of docs/environments.md, as a reader would use them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from spear_lightning.environments.base import Observation, TaskSuite
from spear_lightning.environments.custom import GymnasiumSuite
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.environments.textworld import TextWorld

DOCUMENT = Path(__file__).parents[2] / "docs" / "environments.md"


def blocks(heading: str, language: str) -> list[str]:
    """The code blocks of a section."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def suite(heading: str) -> TaskSuite:
    """The suite that the section's YAML composes."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(TaskSuite, "environment")
    (text,) = blocks(heading, "yaml")
    environment = yaml.safe_load(text)["data"]["environment"]
    made = parser.instantiate_classes(parser.parse_object({"environment": environment})).environment
    assert isinstance(made, TaskSuite)
    return made


def middle(seen: Observation) -> str:
    """A player that halves what is left."""
    return seen.admissible[len(seen.admissible) // 2]


def test_your_own_environment_plays_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("Your own environment", "python")
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_games.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    own = suite("Your own environment")
    assert isinstance(own, GymnasiumSuite)
    with EnvironmentPool(own, workers=1) as pool:
        seen = pool.reset(dict(enumerate([*own.tasks("train")[:20], own.tasks("validation")[0]])))
        assert {answer.task for answer in seen.values()} == {"Guess a number between 1 and 30 in 5 guesses."}
        assert {answer.anchor for answer in seen.values()} == {"1-30"}
        lost = pool.reset({30: own.tasks("test")[0]})
        for hostile in ("", "9" * 10_000, "二\ud800\n", "٣", "-1"):
            lost = pool.step({30: hostile})
        assert (lost[30].aborted, lost[30].truncated, lost[30].won) == (None, True, False)
        won = set()
        for _ in range(5):  # enough for 30 numbers, if each guess halves them
            seen = pool.step({slot: middle(answer) for slot, answer in seen.items() if not answer.done})
            won |= {slot for slot, answer in seen.items() if answer.won and answer.reward == 1}
        assert won == set(range(21))


def test_textworld_configuration_is_understood() -> None:
    made = suite("TextWorld games")
    assert isinstance(made, TextWorld)
    assert (made.games.challenge, made.games.settings, made.max_steps) == ("treasure_hunter", {"level": 5}, 30)

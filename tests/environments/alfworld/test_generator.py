"""Generated games: deterministic, winnable, of every type."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.environments.alfworld.generator import GeneratedGame, SceneSize, generate_game
from spear_lightning.environments.alfworld.rooms import TASK_TYPES


@given(kind=st.sampled_from(TASK_TYPES), seed=st.integers(0, 10**7))
@settings(max_examples=60, deadline=None)
def test_equal_seeds_give_equal_games(kind: str, seed: int) -> None:
    first, second = generate_game(kind, seed), generate_game(kind, seed)
    assert first == second
    assert first.problem != generate_game(kind, seed + 1).problem


@given(
    kind=st.sampled_from(TASK_TYPES),
    seed=st.integers(0, 10**6),
    receptacles=st.integers(5, 14),
    distractors=st.integers(0, 12),
)
@settings(max_examples=60, deadline=None)
def test_rooms_have_the_size_asked_for(kind: str, seed: int, receptacles: int, distractors: int) -> None:
    size = SceneSize((receptacles, receptacles), (distractors, distractors))
    game = generate_game(kind, seed, size)
    furniture = len(re.findall(r"^\S+ - receptacle$", game.problem, re.MULTILINE))
    objects = len(re.findall(r"^\S+ - object$", game.problem, re.MULTILINE))
    wanted = 2 if kind == "pick_two_obj_and_place" else 1
    lamp = kind == "look_at_obj_in_light"
    assert furniture == receptacles or furniture < receptacles <= 14  # a small room may have no more to offer
    assert objects - distractors - lamp in (wanted, 2)


def test_the_files_hold_what_alfworld_reads(solved: list[tuple[GeneratedGame, list[str]]]) -> None:
    for game, walkthrough in solved:
        entries = json.loads(game.game_json(walkthrough))
        trajectory = json.loads(game.trajectory_json())
        assert entries["solvable"] is True
        assert entries["walkthrough"] == walkthrough
        assert trajectory["task_type"] == game.task_type
        assert f"Your task is to: {game.instruction}." in entries["grammar"]
        assert "UNKNOWN GOAL" not in entries["grammar"]


def test_bad_sizes_and_types_are_named() -> None:
    with pytest.raises(ValueError, match=r"scene\.receptacles"):
        SceneSize(receptacles=(9, 5))
    with pytest.raises(ValueError, match=r"scene\.distractors"):
        SceneSize(distractors=(-1, 5))
    with pytest.raises(ValueError, match=r"pick_nose.*pick_and_place_simple"):
        generate_game("pick_nose", 0)

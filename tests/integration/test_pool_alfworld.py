"""The pool on the real ALFWorld engine."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from spear_lightning.environments.alfworld import ALFWorld
from spear_lightning.environments.base import Observation
from spear_lightning.environments.pool import EnvironmentPool


def walk(pool: EnvironmentPool, observations: dict[int, Observation], steps: int) -> dict[int, list[str]]:
    """Take random admissible actions; each slot's choices depend on the slot alone."""
    choices = {slot: random.Random(slot) for slot in observations}
    texts = {slot: [observation.text] for slot, observation in observations.items()}
    for _ in range(steps):
        actions = {slot: choices[slot].choice(seen.admissible) for slot, seen in observations.items() if not seen.done}
        observations = pool.step(actions)
        for slot, observation in observations.items():
            texts[slot].append(observation.aborted or observation.text)
    return texts


@pytest.mark.slow
def test_64_alfworld_environments_in_2_workers_survive_a_kill(tmp_path: Path) -> None:
    suite = ALFWorld(train=8, validation=1, test=1, cache_dir=str(tmp_path), max_steps=30)
    suite.prepare()
    games = suite.tasks("train")
    tasks = {slot: games[slot % 8] for slot in range(64)}
    with EnvironmentPool(suite, workers=2) as pool:
        first = walk(pool, pool.reset(tasks), 8)
        assert len(pool.pids) == 2
        assert not any("environment" in text for texts in first.values() for text in texts)
        opened = pool.reset(tasks)
        os.kill(pool.pids[0], signal.SIGKILL)
        second = walk(pool, opened, 8)
        for slot, texts in second.items():
            if slot % 2:
                assert texts == first[slot]
            else:
                assert texts[1].startswith("environment worker died")
                assert len(texts) == 2
        assert walk(pool, pool.reset(tasks), 8) == first
        answers = pool.reset({0: games[0]}) | pool.step({1: "\ud800", 2: "x" * 10_000, 3: ""})
        assert [answers[slot].text for slot in (1, 2, 3)] == ["Nothing happens."] * 3

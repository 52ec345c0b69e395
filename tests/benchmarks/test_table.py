"""The table compares published recipes: they are scaled where benchmarks/table says so, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison.plan import Arm
from table import ARMS, BASELINES, arguments_of

from spear_lightning.algorithm import Drain, QualityFilters, ReplayBuffer
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.checks import check_replay
from tests.composing import CONFIGS, composed

LEARNING = {"model.loss", "model.aggregation", "data.advantage", "data.filters"}
SPEAR = {"model.loss", "model.replay_loss", "data.replay", "data.replay_steps", "data.baseline", "trainer.callbacks"}


def test_every_cell_is_a_recipe_and_its_scale() -> None:
    given = arguments_of("alfworld", ARMS, [1, 2], 2, Path("out"))
    arms = {arm.name: arm.overlays for arm in (Arm.parse(text[6:]) for text in given if text.startswith("--arm="))}
    assert tuple(arms) == ARMS
    for name, (recipe, *scale) in arms.items():
        assert recipe == CONFIGS / "algorithm" / f"{name}.yaml"
        assert [path.name for path in scale] == (["scale-spear.yaml"] if name.startswith("spear-") else [])
    at = given.index("--baseline")
    assert given[at + 1 : at + 5] == [f"spear-{name}={name}" for name in BASELINES]


@pytest.mark.parametrize("baseline", BASELINES)
def test_spear_and_its_baseline_differ_in_spear_alone(baseline: str) -> None:
    here = "../benchmarks/table"
    plain = composed(f"{here}/alfworld", f"algorithm/{baseline}")
    spear = composed(f"{here}/alfworld", f"algorithm/spear-{baseline}", f"{here}/scale-spear")
    for part in ("model", "data", "trainer"):
        changed = {f"{part}.{key}" for key, value in plain[part].items() if spear[part][key] != value}
        assert changed <= SPEAR
    *_, schedule = (c["init_args"] for c in spear["trainer"]["callbacks"] if c["class_path"].endswith("Schedule"))
    assert schedule["imitation_warmup"] == schedule["tool_reward_decay"] == spear["trainer"]["max_epochs"]
    replay, rollouts = spear["data"]["replay"]["init_args"], spear["data"]["rollouts"]
    assert rollouts["tasks"] * rollouts["group_size"] * 4 == 32 * 8
    assert replay["capacity"] * 4 == 2048
    filters = QualityFilters(keep_share=spear["data"]["filters"]["keep_share"])
    buffer = ReplayBuffer(replay["capacity"], replay["max_age"], Drain(ready=1.5))
    check_replay(buffer, filters, TrainingRollouts(8, 8), spear["data"]["max_turns"])  # it can fire


def test_baselines_differ_in_what_the_recipes_name() -> None:
    one, *others = (composed("../benchmarks/table/alfworld", f"algorithm/{name}") for name in BASELINES)
    for other in others:
        for part in ("model", "data", "trainer"):
            assert {f"{part}.{key}" for key, value in one[part].items() if other[part][key] != value} <= LEARNING

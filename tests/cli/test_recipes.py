"""Every recipe is what was published: each value against a table of what the published scripts run, defaults in force.

A new recipe is a new entry of ``ALGORITHMS``: the tasks it is for, and its values. Keys are those of the composed
configuration; what is configured by class has the class's name at its own key and its settings below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import yaml

from spear_lightning.algorithm import Drain, QualityFilters, ReplayBuffer, ReplayEntry, RewardBaseline
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.checks import check_replay
from tests.composing import CONFIGS, composed

# --- what was published ---------------------------------------------------------------------------------------------

EVERYWHERE = {
    "model.max_response_length": None,  # L, the longest response allowed
    "data.rollouts.temperature": 1.0,
    "data.rollouts.max_staleness": 0,
    "data.epochs": 1,
    "data.reward.score_scale": 0.0,
    "data.reward.tool_scale": 1.0,
    "data.reward.tool_variant": "linear",
    "data.reward.format_reward": 0.0,
}
GAMES = {
    "model.entropy_bonus": 0.001,
    "model.policy.model": "Qwen/Qwen2.5-1.5B-Instruct",
    "model.optimizer": "AdamW",
    "model.optimizer.lr": 1e-6,
    "data.rollouts.tasks": 32,
    "data.rollouts.group_size": 8,
    "data.agent": "StepwiseAgent",
    "data.agent.history_length": 2,
    "data.agent.think": True,
    "data.max_response_tokens": 512,
    "data.evaluation.temperature": 0.4,
    "data.evaluation.top_p": 1.0,
    "data.reward.success": 10.0,
    "data.reward.failure": 0.0,
    "data.reward.invalid_penalty": 0.1,
}
TASKS: dict[str, dict[str, Any]] = {
    "alfworld": EVERYWHERE
    | GAMES
    | {
        "trainer.max_epochs": 200,
        "data.environment": "ALFWorld",
        "data.environment.games": "official",
        "data.environment.max_steps": 50,
        "data.max_turns": 50,
        "data.agent.max_prompt_tokens": 2048,
        "data.minibatch_samples": 1024,
    },
    "webshop": EVERYWHERE
    | GAMES
    | {
        "trainer.max_epochs": 350,
        "data.environment": "WebShop",
        "data.environment.catalogue": "official",
        "data.environment.products": 1000,
        "data.environment.goals": "synthetic",
        "data.environment.max_steps": 15,
        "data.max_turns": 15,
        "data.agent.max_prompt_tokens": 4096,
        "data.minibatch_samples": 256,
    },
    "math": EVERYWHERE
    | {
        "trainer.check_val_every_n_epoch": 5,
        "model.entropy_bonus": 0.0,
        "model.policy.model": "Qwen/Qwen2.5-32B-Instruct",
        "data.environment": "MathProblems",
        "data.environment.train": "HuggingFaceProblems",
        "data.environment.train.name": "BytedTsinghua-SIA/DAPO-Math-17k",
        **{
            f"data.environment.{split}{key}": value
            for split in ("validation", "test")
            for key, value in {
                "": "ProblemSets",
                ".sources.aime24": "HuggingFaceProblems",
                ".sources.aime24.name": "Maxwell-Jia/AIME_2024",
                ".sources.aime25": "HuggingFaceProblems",
                ".sources.aime25.name": "yentinglin/aime_2025",
            }.items()
        },
        "data.environment.grader": "StrictBox",
        "data.environment.tool": "code_interpreter",
        "data.environment.max_turns": 8,
        "data.max_turns": 8,
        "data.agent": "ChatToolAgent",
        "data.agent.max_prompt_tokens": 2048,
        "data.max_response_tokens": 16384,
        "data.max_episode_tokens": 16384 + 2048,
        "data.rollouts.tasks": 128,
        "data.rollouts.group_size": 16,
        "data.minibatch_samples": 64 * 16,
        "data.evaluation.temperature": 1.0,
        "data.evaluation.top_p": 0.6,
        "data.evaluation.episodes_per_task": 32,
        "data.reward.success": 1.0,
        "data.reward.failure": -1.0,
        "data.reward.invalid_penalty": 0.0,
    },
}


def _values(prefix: str, kind: str, /, **settings: Any) -> dict[str, Any]:
    return {prefix: kind} | {f"{prefix}.{name}": value for name, value in settings.items()}


def _filters(on: bool, share: float) -> dict[str, Any]:
    quality = dict.fromkeys(("overlong", "incomplete", "repetitive", "unreadable"), on)
    return {f"data.filters.{name}": value for name, value in (quality | {"keep_share": share}).items()}


GROUP = _values("data.advantage", "GRPO", normalize_std=True, weighting="turn")
CENTRED = _values("data.advantage", "GRPO", normalize_std=False, weighting="turn")
STEPS = _values("data.advantage", "GiGPO", gamma=0.95, mode="mean_std_norm", step_weight=1.0, episode_weighting="turn")
PLAIN = {"model.reference_kl": 0.0, "model.aggregation": "token-mean"} | _filters(False, 1.0)
DRBOT = {"model.reference_kl": 0.0, "model.aggregation": "seq-mean-token-sum-norm"} | _filters(True, 0.75)


def _baseline(high: float) -> dict[str, Any]:
    loss = _values("model.loss", "PPOClip", clip_low=0.2, clip_high=high, dual_clip=10.0)
    return loss | {"model.replay_loss": None, "data.replay": None}


def _spear(high: float, bounds: tuple[float, float], divided: bool, warmup: int = 200) -> dict[str, Any]:
    clip = {"clip_low": 0.2, "clip_high": high, "covariance": "batch"}
    lower, upper = bounds
    return {
        **_values("model.loss", "ClipCov", ratio=0.0002, lower=1.0, upper=5.0, **clip),
        **_values("model.replay_loss", "ClipCov", ratio=0.02, lower=lower, upper=upper, **clip),
        **_values("data.replay", "ReplayBuffer", capacity=2048, max_age=7, filter_outgrown=True),
        **_values("data.replay.schedule", "Drain", ready=1.5),
        **_values("data.replay.recalibration", "BaselineRecalibration", normalize_std=divided),
        **_values("data.baseline", "RewardBaseline", capacity=10240, percentile=50.0, groups="kept", current=False),
        "data.replay_steps": "own",
        **_values(
            "trainer.callbacks.CurriculumSchedule",
            "CurriculumSchedule",
            imitation_warmup=warmup,
            tool_reward_decay=200,
            imitation_max=1.0,
            tool_reward_max=1.0,
            imitation=None,
            tool_reward=None,
        ),
    }


GAME, ANY = ("alfworld", "webshop"), ("alfworld", "webshop", "math")
ALGORITHMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "grpo": (ANY, PLAIN | GROUP | _baseline(0.2)),
    "gigpo": (GAME, PLAIN | STEPS | _baseline(0.2)),
    "drbot-grpo": (ANY, DRBOT | CENTRED | _baseline(0.28)),
    "drbot-gigpo": (GAME, DRBOT | STEPS | _baseline(0.28)),
    "rloo": (GAME, PLAIN | {"data.advantage": "RLOO", "data.rollouts.resample": 0} | _baseline(0.2)),
    "dapo": (GAME, PLAIN | GROUP | {"data.filters.overlong": True} | _baseline(0.28)),
    "spear-grpo": (GAME, PLAIN | GROUP | _spear(0.2, (2.0, 60.0), divided=True)),
    "spear-gigpo": (GAME, PLAIN | STEPS | _spear(0.2, (2.0, 60.0), divided=False)),
    "spear-drbot-grpo": (GAME, DRBOT | CENTRED | _spear(0.28, (2.0, 60.0), divided=False)),
    "spear-drbot-gigpo": (GAME, DRBOT | STEPS | _spear(0.28, (2.0, 60.0), divided=False)),
    "spear-drbot-grpo-math": (("math",), DRBOT | CENTRED | _spear(0.28, (1.0, 40.0), divided=False, warmup=300)),
}
RECIPES = [(task, name) for name, (tasks, _) in ALGORITHMS.items() for task in tasks]

OVERLAYS = {"loss-clip-cov"}
"""In configs/algorithm, and no recipes: laid over one."""

OURS = {
    "seed_everything": "a run can be repeated",
    "run.directory": "where it writes",
    "trainer.num_sanity_val_steps": "evaluate before the first update as well",
    "trainer.enable_model_summary": "what is printed",
    "trainer.log_every_n_steps": "what is logged",
    "trainer.callbacks.EntropyMonitor": "what is logged",
    "trainer.callbacks.RolloutLog": "what is logged",
    "trainer.callbacks.RolloutLog.every_n_iterations": "what is logged",
    "trainer.callbacks.RolloutProgress": "what is shown",
    "trainer.callbacks.LearningCurve": "what is logged",
    **{
        f"trainer.callbacks.ModelCheckpoint{key}": "the last state is kept, so that a run can go on"
        for key in ("", ".save_top_k", ".save_last", ".save_on_train_epoch_end")
    },
    "trainer.check_val_every_n_epoch": "the sources say how often for mathematics only",
    "trainer.max_epochs": "the sources say how many iterations for ALFWorld and WebShop only",
    "model.optimizer": "the sources name it for ALFWorld and WebShop only",
    "model.optimizer.lr": "likewise",
    "model.max_grad_norm": "the usual value; the sources give none",
    "data.agent.role": "the words of a prompt",
    "data.rollouts.resample": "DAPO samples until a batch is full, here a bound is set",
    "data.engine": "who generates",
    **{
        f"data.environment.{source}.columns.{column}": "how the data set names its columns"
        for source in (
            "train",
            *(f"{split}.sources.aime{year}" for split in ("validation", "test") for year in (24, 25)),
        )
        for column in ("question", "answer")
    },
    "data.environment.train.columns.remove": "the words of a prompt",
    "data.max_tokens": "how a step is cut to fit into memory; changes no result",
    "data.workers": "processes",
    "data.step_timeout": "when a sandbox is given up",
}


# --- reading configurations -----------------------------------------------------------------------------------------


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration with dotted keys; lists of callbacks by the names of their classes."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(entry, Mapping) and "class_path" in entry for entry in value)
    ):
        value = {str(entry["class_path"]).rpartition(".")[2]: entry for entry in value}
    if isinstance(value, Mapping) and "class_path" in value:
        kind = str(value["class_path"]).rpartition(".")[2]
        return {prefix: kind} | flatten(value.get("init_args") or {}, prefix)
    if isinstance(value, Mapping):
        pairs = [(f"{prefix}.{key}" if prefix else str(key), inner) for key, inner in value.items()]
        return {name: found for key, inner in pairs for name, found in flatten(inner, key.rstrip("+")).items()}
    return {prefix: value}


def written(name: str) -> set[str]:
    """The keys that a file sets itself."""
    return set(flatten(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))))


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "name"), RECIPES)
def test_every_value_is_the_published_one(task: str, name: str) -> None:
    found = flatten(composed(task, f"algorithm/{name}"))
    published = TASKS[task] | ALGORITHMS[name][1]
    missing = object()
    both = {key: (found.get(key, missing), value) for key, value in published.items()}
    assert not {key: pair for key, pair in both.items() if pair[0] != pair[1]}, "key: (in the recipe, published)"
    if "spear" not in name:
        assert "trainer.callbacks.CurriculumSchedule" not in found


@pytest.mark.parametrize(
    ("name", "published"),
    [*TASKS.items(), *((f"algorithm/{name}", values) for name, (_, values) in ALGORITHMS.items())],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_key_that_a_recipe_sets_is_in_the_table(name: str, published: dict[str, Any]) -> None:
    keys = written(name)
    unknown = sorted(keys - published.keys() - OURS.keys())
    assert not unknown, f"{name} sets what is neither published nor said to be ours"


def test_every_recipe_is_in_the_table_and_every_excuse_is_needed() -> None:
    assert {path.stem for path in (CONFIGS / "algorithm").glob("*.yaml")} == ALGORITHMS.keys() | OVERLAYS
    keys = {key for name in (*TASKS, *(f"algorithm/{name}" for name in ALGORITHMS)) for key in written(name)}
    assert not OURS.keys() - keys, "no recipe sets it"


@pytest.mark.parametrize("name", ["grpo", "drbot-gigpo", "spear-drbot-grpo"])
def test_clip_cov_on_policy_is_an_overlay_that_keeps_the_clip_range(name: str) -> None:
    plain = flatten(composed("alfworld", f"algorithm/{name}"))
    clipped = flatten(composed("alfworld", f"algorithm/{name}", "algorithm/loss-clip-cov"))
    changed = {key for key in plain.keys() | clipped.keys() if plain.get(key) != clipped.get(key)}
    possible = {f"model.loss{key}" for key in ("", ".ratio", ".lower", ".upper", ".covariance", ".dual_clip")}
    assert {"model.loss.ratio", "model.loss.upper"} <= changed <= possible
    high = 0.2 if name == "grpo" else 0.28
    expected = _values(
        "model.loss", "ClipCov", ratio=0.02, lower=1.0, upper=40.0, clip_low=0.2, clip_high=high, covariance="batch"
    )
    assert {key: value for key, value in clipped.items() if key.startswith("model.loss")} == expected


# --- what the published figures lead to -----------------------------------------------------------------------------


def _replays(tasks: int, size: int, max_age: int, iterations: int) -> dict[int, int]:
    """Entries replayed in each iteration that replays, of a policy that solves problems of every difficulty."""
    random = np.random.default_rng(0)
    buffer, baseline = ReplayBuffer(2048, max_age, Drain(1.5)), RewardBaseline(groups="kept", current=False)
    replayed = {}
    for iteration in range(iterations):
        difficulty = random.uniform(0, 1, tasks)
        wins = random.random((tasks, size)) < difficulty[:, None]
        rewards = np.where(wins, 1.0, -1.0)
        deviations = rewards.std(axis=1, ddof=1)
        kept = np.argsort(-deviations)[: int(0.75 * tasks)]
        kept = kept[deviations[kept] > 0]
        drawn = buffer.draw(iteration, baseline, seed=0, fresh=tasks * size)
        entries = [
            ReplayEntry(f"{iteration}/{group}/{index}", None, 1.0, 1.0 - rewards[group].mean(), iteration)
            for group in kept
            for index in np.flatnonzero(wins[group])
        ]
        buffer.add(entries, iteration)
        baseline.update(rewards[kept].mean(axis=1))
        if drawn:
            replayed[iteration] = len(drawn)
    return replayed


def test_mathematics_can_imitate() -> None:
    found = flatten(composed("math", "algorithm/spear-drbot-grpo-math"))
    tasks, size = found["data.rollouts.tasks"], found["data.rollouts.group_size"]
    age, needed = found["data.replay.max_age"], 1.5 * found["data.replay.capacity"]
    # 96 groups of 128 are kept, 15 of 16 can be above the mean of their group, for 7 iterations.
    assert int(found["data.filters.keep_share"] * tasks) * (size - 1) * age == 10_080 > 3 * needed
    buffer, filters = ReplayBuffer(2048, age, Drain(1.5)), QualityFilters(keep_share=0.75)
    check_replay(buffer, filters, TrainingRollouts(tasks=tasks, group_size=size), 1)
    replays = _replays(tasks, size, age, 20)
    assert min(replays) == 4, "the fifth iteration"
    assert set(replays.values()) == {2048}
    # A batch of 32 x 16 never gets there, whether entries live 5 iterations or 7.
    assert not _replays(32, size, 5, 40) | _replays(32, size, age, 40)
    with pytest.raises(Exception, match="It would never replay"):
        check_replay(buffer, filters, TrainingRollouts(tasks=32, group_size=size), 1)

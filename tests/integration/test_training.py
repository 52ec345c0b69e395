"""Whole iterations on the real ALFWorld engine with the shipped policy."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.conftest import ROOT, start_spear
from tests.integration.runs import curve, entries_of

pytestmark = pytest.mark.slow


def test_a_run_writes_what_it_promises_and_the_same_seed_gives_the_same_curve(spear, tmp_path):
    spear("fit")
    first = tmp_path / "run"
    for name in ("config.yaml", "metrics.csv", "learning_curve.png", "evaluations.json", "checkpoints/last.ckpt"):
        assert (first / name).exists(), name
    assert list(first.glob("events.out.tfevents.*"))
    assert list((first / "rollouts" / "train").glob("*.jsonl"))
    rows = curve(first)
    assert len(rows) == 3
    assert float(rows[0]["rollout/episodes"]) == 16
    assert float(rows[-1]["update/steps"]) + float(rows[-1]["update/skipped"]) == 4
    spear("fit", {"run.directory": str(tmp_path / "again")})
    assert curve(tmp_path / "again") == rows
    spear("fit", {"run.directory": str(tmp_path / "other"), "seed_everything": 2, "trainer.max_epochs": 1})
    assert curve(tmp_path / "other") != rows[:1]


def test_kill_and_resume_gives_the_uninterrupted_curve(spear, tmp_path, games_cache):
    # a buffer that replays early, so that resume depends on its contents
    changes = {
        "trainer.max_epochs": 4,
        "data.replay.init_args.schedule": {"class_path": "Mix", "init_args": {"ratio": 0.5}},
    }
    spear("fit", changes)
    whole = tmp_path / "run"
    killed = tmp_path / "killed"
    process = start_spear("fit", games_cache, killed, changes)
    try:
        deadline = time.monotonic() + 200
        while not (killed / "checkpoints" / "last.ckpt").exists():
            assert process.alive(), "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
    assert len(curve(killed)) < 4
    resumed = spear("fit", {**changes, "run.directory": str(killed)}, "--ckpt_path", "last").stdout
    assert "iteration 1/4" not in resumed
    assert "iteration 4/4" in resumed
    assert curve(killed) == curve(whole)
    assert sum(float(row["replay/used"]) for row in curve(whole)) > 0
    assert (
        json.loads((killed / "evaluations.json").read_text())["evaluations"]
        == json.loads((whole / "evaluations.json").read_text())["evaluations"]
    )
    ours, theirs = (torch.load(folder / "checkpoints/last.ckpt", weights_only=False) for folder in (killed, whole))
    for name, tensor in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], tensor, rtol=0, atol=0)
    replays = [entries_of(checkpoint["RolloutDataModule"]["replay"][0]) for checkpoint in (ours, theirs)]
    assert [entry["key"] for entry in replays[0]] == [entry["key"] for entry in replays[1]]
    for mine, other in zip(*replays, strict=True):
        assert all(torch.equal(mine["payload"][name], other["payload"][name]) for name in other["payload"])


def test_two_ranks_agree_with_one(spear, tmp_path):
    """Same episodes, same groups kept, same gradient: the weights after an iteration agree to 1e-5."""
    plain = {
        "trainer.max_epochs": 1,
        "trainer.num_sanity_val_steps": 0,
        "model.loss": {"class_path": "PPOClip"},  # Clip-Cov looks at a micro-batch at a time, so the cut shows
        "model.replay_loss": {"class_path": "PPOClip"},
        "data.reward.invalid_penalty": 0.1,  # tells episodes apart even where none succeeds
        "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    }
    spear("fit", plain)
    spear("fit", {**plain, "run.directory": str(tmp_path / "two"), "trainer.devices": 2, "trainer.strategy": "ddp"})
    one, two = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=False) for name in ("run", "two"))
    assert float(curve(tmp_path / "run")[0]["update/steps"]) == 4
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-5, atol=1e-5)
    single, double = curve(tmp_path / "run")[0], curve(tmp_path / "two")[0]
    for name in (
        "rollout/success",
        "rollout/episodes",
        "reward/total",
        "replay/size",
        "replay/p50",
        "update/steps",
        "validation/success",
    ):
        assert float(single[name]) == pytest.approx(float(double[name]), abs=1e-5), name
    keys = [
        sorted(entry["key"] for rank in checkpoint["RolloutDataModule"]["replay"] for entry in rank["entries"])
        for checkpoint in (one, two)
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("recipe", ["grpo", "gigpo", "drbot-gigpo", "spear-gigpo", "spear-drbot-grpo"])
def test_published_recipes_train_in_both_contexts(spear, recipe):
    context = (
        {"data.agent": {"class_path": "StepwiseAgent"}, "data.max_response_tokens": 24} if "gigpo" in recipe else {}
    )
    changes = {"trainer.max_epochs": 1, "trainer.num_sanity_val_steps": 0, "trainer.callbacks": [], **context}
    few = ["--data.replay.init_args.capacity=16"] if "spear" in recipe else []  # as much as four tasks can fill
    spear(
        "fit",
        {**changes, "data.max_turns": 5, "data.environment.max_steps": 5},
        "-c",
        f"configs/algorithm/{recipe}.yaml",
        *few,
    )


def test_a_mixture_trains_and_is_reported_by_environment(spear, tmp_path, games_cache):
    splits = {"train": 4, "validation": 3, "test": 3, "max_steps": 3}
    house = {**splits, "cache_dir": str(games_cache)}
    shop = {**splits, "products": 40, "per_page": 2, "goals": "synthetic", "cache_dir": str(tmp_path)}
    environments = {
        "house": {"class_path": "ALFWorld", "init_args": house},
        "shop": {"class_path": "WebShop", "init_args": shop},
    }
    mixture = {"environments": environments, "weights": {"house": 1, "shop": 1}}
    changes = {"trainer.max_epochs": 2, "data.environment": {"class_path": "Mixture", "init_args": mixture}}
    # Neither game is won within three steps by a policy that knows only one of them: the penalty tells episodes apart.
    spear("fit", {**changes, "data.reward.invalid_penalty": 0.1})
    rows = curve(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert float(row["rollout/episodes"]) == 16
        assert float(row["update/grad_norm"]) > 0
        reported = {name for name, value in row.items() if value}
        for split in ("rollout", "validation"):
            assert {f"{split}/success/house", f"{split}/success/shop"} <= reported
    played = (line for file in (tmp_path / "run/rollouts/train").glob("*.jsonl") for line in file.open())
    assert {json.loads(line)["task"]["id"].partition("/")[0] for line in played} == {"house", "shop"}


def test_another_architecture_trains_by_changing_the_policy_alone(spear, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    embedded = ROOT / "spear_lightning/policy/embedded"
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    # random weights never win: let the reward tell apart what they do
    changes = {
        "model.policy.model": str(tmp_path / "llama"),
        "data.reward.invalid_penalty": 0.1,
        "trainer.max_epochs": 1,
    }
    spear(
        "fit",
        {
            **changes,
            "trainer.num_sanity_val_steps": 0,
            "data.filters.incomplete": False,
            "data.filters.overlong": False,
        },
    )


def test_generation_and_training_alternate_strictly(games_cache):
    from lightning.pytorch import Callback, Trainer

    from spear_lightning.agents.transcript import TranscriptAgent
    from spear_lightning.algorithm import Mix, QualityFilters, ReplayBuffer, RewardComposer
    from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
    from spear_lightning.environments.alfworld import ALFWorld
    from spear_lightning.policy.policy import Policy
    from spear_lightning.rollout.specs import TrainingRollouts
    from spear_lightning.training.datamodule import RolloutDataModule
    from spear_lightning.training.hooks import RolloutHooks
    from spear_lightning.training.module import SpearModule

    events: list[str] = []
    stored: dict[bytes, list[list[float]]] = {}  # the same tokens may be played in several iterations
    replayed: list[tuple[list[float], list[list[float]]]] = []

    class Watch(Callback, RolloutHooks):
        def on_train_epoch_start(self, trainer, pl_module):
            events.append(f"start {trainer.current_epoch}")

        def on_rollout_start(self, trainer, pl_module, split, episodes):
            events.append(f"play {trainer.current_epoch}")

        def on_rollout_end(self, trainer, pl_module, rollout):
            assert {item.weight_version for item in rollout.episodes} == {pl_module.weight_version}
            for item in rollout.episodes:
                ids = np.concatenate([t for turn in item.turns for t in (turn.prompt_ids, turn.response_ids)])
                logps = np.concatenate([turn.logps for turn in item.turns])
                stored.setdefault(ids.tobytes(), []).append(logps.tolist())

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            events.append(f"update {trainer.current_epoch}")
            for micro_batch in batch.micro_batches["replay"]:
                for row in range(len(micro_batch.input_ids)):
                    length = int(micro_batch.attention_mask[row].sum())
                    key = micro_batch.input_ids[row, :length].numpy().astype(np.int32).tobytes()
                    if key in stored:
                        replayed.append(
                            (
                                micro_batch.old_logps[row, :length][micro_batch.turns[row, :length] >= 0].tolist(),
                                stored[key],
                            )
                        )

    suite = ALFWorld(
        train=8, validation=8, test=8, cache_dir=str(games_cache), max_steps=15, task_types=["pick_and_place_simple"]
    )
    data = RolloutDataModule(
        suite,
        TranscriptAgent(),
        HuggingFaceEngine(),
        rollouts=TrainingRollouts(tasks=4, group_size=4),
        reward=RewardComposer(success=1.0, invalid_penalty=0.0),
        filters=QualityFilters(keep_share=1.0),
        replay=ReplayBuffer(schedule=Mix(ratio=0.5)),
        max_turns=15,
        max_response_tokens=8,
        minibatches=2,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Watch()],
    )
    trainer.fit(SpearModule(Policy("embedded")), datamodule=data)
    assert events == [f"{what} {epoch}" for epoch in range(3) for what in ("start", "play", "update", "update")]
    assert replayed, "nothing was replayed: the test proves nothing"
    for used, played in replayed:
        assert used in played


def test_validate_test_and_predict_work_from_a_checkpoint(spear, tmp_path):
    spear("fit", {"trainer.max_epochs": 1, "trainer.num_sanity_val_steps": 0})
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for command in ("validate", "test"):
        output = spear(command, {"run.directory": str(tmp_path / command)}, "--ckpt_path", checkpoint).stdout
        assert "success" in output
    spear("predict", {"run.directory": str(tmp_path / "predict")}, "--ckpt_path", checkpoint)
    lines = [
        line for file in (tmp_path / "predict" / "rollouts").rglob("*.jsonl") for line in file.read_text().splitlines()
    ]
    assert len(lines) == 8
    assert {"task", "success", "turns"} <= json.loads(lines[0]).keys()


def test_validate_plays_official_games(spear, tmp_path):
    from spear_lightning.environments.alfworld.games import write_official_layout
    from spear_lightning.environments.alfworld.generated import solved_games
    from spear_lightning.environments.alfworld.generator import SceneSize
    from spear_lightning.environments.alfworld.rooms import TASK_TYPES

    for number, split in enumerate(("train", "validation", "test")):
        recipes = [(kind, 100 * number + i, SceneSize()) for i, kind in enumerate(tuple(TASK_TYPES)[:3])]
        write_official_layout(tmp_path / "alfworld", split, solved_games(None, recipes))
    overlay = tmp_path / "official.yaml"
    overlay.write_text(
        "data:\n  environment:\n    class_path: ALFWorld\n"
        f"    init_args: {{games: official, data_dir: {tmp_path}/alfworld}}\n"
    )
    finished = spear("validate", {"data.environment.task_types": None}, "-c", str(overlay))
    assert "3 episodes" in finished.stdout or "/3" in finished.stdout, finished.stdout


def workers_of(parent: int) -> list[int]:
    """Process ids of a run's environment workers, read off the kernel's process table."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, children) if b"environments.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_killed_worker_costs_its_episodes_and_not_the_run(tmp_path, games_cache):
    changes = {"trainer.max_epochs": 2, "data.workers": 2}
    process = start_spear("fit", games_cache, tmp_path / "run", changes)
    deadline = time.monotonic() + 120
    while "validation after 0 iterations" not in process.printed() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(workers_of(process.processes[0].pid)[0], signal.SIGKILL)
    assert process.join() == [0], process.printed()
    assert len(curve(tmp_path / "run")) == 2

"""The next iteration is played while this one trains: the order and the numbers promised, on the real engine."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.algorithm import Mix, QualityFilters, ReplayBuffer, RewardComposer
from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.alfworld import ALFWorld
from spear_lightning.metrics.csv_logger import MetricsCSV
from spear_lightning.policy.policy import LoRA, Policy
from spear_lightning.rollout.specs import Evaluation, TrainingRollouts
from spear_lightning.training.checks import check_whole_weights
from spear_lightning.training.datamodule import RolloutDataModule
from spear_lightning.training.hooks import RolloutHooks
from spear_lightning.training.module import SpearModule
from tests.integration.runs import PLAIN, curve, entries_of, replay, weights

pytestmark = pytest.mark.slow


def train(
    folder: Path,
    cache: Path,
    staleness: int,
    *,
    epochs: int,
    callbacks: list[Callback] | None = None,
    checkpoint: str | None = None,
    lora: LoRA | None = None,
    **rollouts: int,
) -> SpearModule:
    suite = ALFWorld(
        train=8, validation=4, test=4, cache_dir=str(cache), max_steps=15, task_types=["pick_and_place_simple"]
    )
    data = RolloutDataModule(
        suite,
        TranscriptAgent(),
        HuggingFaceEngine(),
        rollouts=TrainingRollouts(**{"tasks": 4, "group_size": 4, **rollouts}, max_staleness=staleness),
        evaluation=Evaluation(tasks=2),
        reward=RewardComposer(success=1.0, invalid_penalty=0.1),
        filters=QualityFilters(keep_share=1.0, overlong=False, incomplete=False, repetitive=False, unreadable=False),
        replay=ReplayBuffer(schedule=Mix(ratio=0.5)),
        max_turns=15,
        max_response_tokens=8,
        minibatches=2,
        workers=1,
        seed=3,
    )
    module = SpearModule(
        Policy("embedded", lora=lora), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=MetricsCSV(str(folder)),
        default_root_dir=str(folder),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or ()),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks or [],
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    return module


class Watch(Callback, RolloutHooks):
    """The policy after each iteration, the versions that played, and whether the numbers are those of these weights."""

    def __init__(self) -> None:
        self.after: list[tuple[int, Policy]] = []
        self.played: list[set[int]] = []
        self.validated: list[bool] = []
        self.stored: set[bytes] = set()
        self.first_ratios: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.after.append((pl_module.weight_version, copy.deepcopy(pl_module.policy)))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.after.append((pl_module.weight_version, copy.deepcopy(pl_module.policy)))

    def on_rollout_end(self, trainer: Any, pl_module: Any, rollout: Any) -> None:
        versions = {item.weight_version for item in rollout.episodes}
        if rollout.split == "validation":
            self.validated.append(versions == {pl_module.weight_version})
            return
        self.played.append(versions)
        policy = dict(self.after)[min(versions)]
        self.stored.clear()
        for item in rollout.episodes:
            turns = item.turns
            ids = np.concatenate([part for turn in turns for part in (turn.prompt_ids, turn.response_ids)])
            told = np.concatenate([part for t in turns for part in (np.zeros(len(t.prompt_ids)), t.logps)])
            mask = torch.from_numpy(told != 0)[None]
            with torch.no_grad():
                found = policy(torch.from_numpy(ids).long()[None], torch.ones(1, len(ids)), loss_mask=mask).logps
            np.testing.assert_allclose(found[0].numpy(), told, atol=1e-4)
            self.stored.add(told.astype(np.float32).tobytes())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        ratios = []
        for each in batch.micro_batches["fresh"]:
            for row, length in enumerate(each.attention_mask.sum(1).tolist()):
                if each.response_mask[row].any():
                    assert each.old_logps[row, :length].numpy().tobytes() in self.stored, "not what it was played with"
            with torch.no_grad():
                now = pl_module.policy(each.input_ids, each.attention_mask, loss_mask=each.response_mask).logps
            ratios.append(float(((now - each.old_logps) * each.response_mask).abs().max()))
        if batch_idx == 0:
            self.first_ratios.append(max(ratios, default=float("nan")))


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "LoRA"])
def test_an_iteration_is_played_with_the_weights_before_the_last_updates(tmp_path, games_cache, lora):
    watch = Watch()
    train(tmp_path, games_cache, 1, epochs=4, callbacks=[watch], lora=lora)
    versions = [version for version, _ in watch.after]
    assert versions == [0, 2, 4, 6, 8]
    assert watch.played == [{0}, {0}, {2}, {4}], "with those after the iteration before the last"
    assert watch.validated == [True] * 4, "held-out episodes are played with the weights of the moment"
    assert watch.first_ratios[0] < 1e-4, "the first iteration is on-policy"
    assert min(watch.first_ratios[1:]) > 1e-3, "the others are not, and the ratio says so"
    rows = curve(tmp_path)
    assert [float(row["rollout/staleness"]) for row in rows] == [0, 2, 2, 2]


def test_without_staleness_the_order_is_strict(tmp_path, games_cache):
    watch = Watch()
    train(tmp_path, games_cache, 0, epochs=3, callbacks=[watch])
    assert watch.played == [{0}, {2}, {4}]
    assert max(watch.first_ratios) < 1e-4
    assert [float(row["rollout/staleness"]) for row in curve(tmp_path)] == [0, 0, 0]


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, games_cache):
    def keep(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    whole = train(tmp_path / "whole", games_cache, 1, epochs=4, callbacks=[keep(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    start = tmp_path / "again" / "epoch=1.ckpt"
    waiting = torch.load(start, weights_only=False)["RolloutDataModule"]["played"]
    assert [state["iteration"] for state in waiting] == [2], "an iteration is under way: the test proves something"
    again = train(tmp_path / "again", games_cache, 1, epochs=4, checkpoint=str(start), callbacks=[keep(tmp_path / "b")])
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")
    for one, other in zip(again.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    ours, theirs = (
        torch.load(path, weights_only=False)["RolloutDataModule"]
        for path in (tmp_path / "b" / "epoch=3.ckpt", tmp_path / "whole" / "epoch=3.ckpt")
    )
    assert ours["played"] is theirs["played"] is None, "nothing is played after the last iteration"
    for mine, other in zip(entries_of(ours["replay"][0]), entries_of(theirs["replay"][0]), strict=True):
        assert {**mine, "payload": None} == {**other, "payload": None}
        assert all(torch.equal(mine["payload"][name], other["payload"][name]) for name in other["payload"])

    # What was under way is not used where it no longer belongs.
    with pytest.warns(UserWarning, match="played anew"):
        train(tmp_path / "c", games_cache, 1, epochs=3, checkpoint=str(start), group_size=3)
    train(tmp_path / "d", games_cache, 0, epochs=3, checkpoint=str(start))
    assert float(curve(tmp_path / "d")[-1]["rollout/staleness"]) == 0


def test_two_ranks_play_ahead_and_resume(spear_in, tmp_path):
    changes: dict[str, Any] = {**PLAIN, "data.rollouts.max_staleness": 1, "data.max_turns": 6}
    two = {**changes, "trainer.devices": 2, "trainer.strategy": "ddp"}
    spear_in(tmp_path / "one", "fit", changes)
    spear_in(tmp_path / "two", "fit", two)
    last = "checkpoints/iteration-00003"
    single, double = (weights(tmp_path / name / last / "state") for name in ("one", "two"))
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, rtol=1e-5, atol=1e-5)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "two/checkpoints/iteration-00002", resumed / "checkpoints/iteration-00002")
    spear_in(resumed, "fit", two, "--ckpt_path", "last")
    mine, other = ({n: v for n, v in curve(run)[-1].items() if v} for run in (resumed, tmp_path / "two"))
    assert mine == other
    assert float(mine["rollout/staleness"]) > 0
    for name, tensor in double.items():
        assert torch.equal(weights(resumed / last / "state")[name], tensor)
    for rank in range(2):
        assert [e["key"] for e in replay(resumed / last, rank)] == [
            e["key"] for e in replay(tmp_path / "two" / last, rank)
        ]


def test_partitioned_weights_are_refused():
    check_whole_weights(ZeroStrategy(2))
    with pytest.raises(MisconfigurationException, match=r"data\.rollouts\.max_staleness is 1.*stage 3"):
        check_whole_weights(ZeroStrategy(3))

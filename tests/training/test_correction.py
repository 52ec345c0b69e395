"""Old log-probabilities that the trainer recomputes: what rows get, how often, and what the replay buffer keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.algorithm import Mix, QualityFilters, ReplayBuffer, truncated_importance_weights
from spear_lightning.data.minibatches import Minibatch
from spear_lightning.data.samples import Sample
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.math import MathProblems
from spear_lightning.metrics.store import MetricStore
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.episode import Rollout
from spear_lightning.rollout.runner import AsyncRollout
from spear_lightning.training.correction import RolloutCorrection
from spear_lightning.training.datamodule import RolloutDataModule
from spear_lightning.training.module import SpearModule
from tests.data.made import make_episode, make_turn
from tests.training.test_module import random_rows

ENGINE = np.float32(-0.5)  # what the engine says of each token that it generates: the trainer says otherwise
MakePolicy = Callable[..., Policy]
Told = dict[bytes, tuple[list[float], list[float] | None]]


def told_by(policy: Policy, row: Sample) -> np.ndarray:
    """Log-probabilities of a row by itself, 0 outside its mask."""
    ids, mask = torch.from_numpy(row.ids).long()[None], torch.from_numpy(row.mask)[None]
    with torch.no_grad():
        return policy(ids, torch.ones_like(ids), 0.7, loss_mask=mask).logps[0].numpy() * row.mask


def corrected(policy: Policy, rows: dict[str, Sample], max_tokens: int = 30, **settings: Any) -> dict[str, Sample]:
    correction = RolloutCorrection(**{"recompute": True, **settings})
    passing = {"pad_id": 0, "max_tokens": max_tokens, "temperature": 0.7}
    return correction.apply(rows, policy, torch.device("cpu"), MetricStore(), **passing)


@pytest.fixture
def rows() -> dict[str, Sample]:
    """Rows of several lengths, the second with a token outside its mask."""
    rows = random_rows(9)
    rows["0/1"].mask[np.flatnonzero(rows["0/1"].mask)[0]] = False
    return rows


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_each_row_gets_its_own_log_probabilities_and_weights(tiny_policy: MakePolicy, rows: Any, layout: Any) -> None:
    policy = tiny_policy(layout=layout)
    found = corrected(policy, rows, cap=1.5)
    assert found.keys() == rows.keys()
    for key, row in rows.items():
        expected = told_by(policy, row)
        np.testing.assert_allclose(found[key].logps, np.where(row.mask, expected, row.logps), atol=1e-4)
        weights = np.where(row.mask, np.minimum(np.exp(expected - row.logps), 1.5), 1)
        np.testing.assert_allclose(found[key].weights, weights, rtol=1e-3)
        assert found[key].logps.dtype == found[key].weights.dtype == np.float32
        assert found[key].advantages is row.advantages


def test_sequences_are_weighed_as_wholes(tiny_policy: MakePolicy, rows: Any) -> None:
    found = corrected(tiny_policy(), rows, cap=5.0, level="sequence")
    kept = {key: set(row.weights[row.mask].tolist()) for key, row in found.items()}
    for key, row in rows.items():
        logps = (torch.from_numpy(x[row.mask])[None] for x in (found[key].logps, row.logps))
        assert kept[key] == set(truncated_importance_weights(*logps, 5.0, "sequence")[0].tolist())
    assert sorted(map(tuple, kept.values()))[0] != sorted(map(tuple, kept.values()))[-1], "one case proves nothing"


def test_nothing_is_computed_where_nothing_is_recomputed(rows: Any) -> None:
    found = corrected(None, rows, recompute=False)  # type: ignore[arg-type]
    assert all(found[key] is row for key, row in rows.items())


def test_without_a_cap_there_are_no_weights(tiny_policy: MakePolicy, rows: Any) -> None:
    assert {row.weights for row in corrected(tiny_policy(), rows).values()} == {None}


def test_a_rank_with_less_takes_part_in_every_pass(tiny_policy: MakePolicy, rows: Any, monkeypatch: Any) -> None:
    policy, shapes = tiny_policy(), []
    policy.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    alone = corrected(policy, rows)
    passes = len(shapes)
    assert passes > 1
    monkeypatch.setattr("spear_lightning.data.micro_batches.gather", lambda count: [count, passes + 2])
    beside = corrected(policy, rows)
    assert shapes[2 * passes :] == [(1, 2)] * 2
    assert all(np.array_equal(beside[key].logps, alone[key].logps) for key in rows)
    assert corrected(policy, {}) == {}
    assert len(shapes) == 3 * passes + 4


# --- in training ------------------------------------------------------------------------------------------------------


class Played:
    """Stands in for the player: four episodes an iteration, two of which succeed, all different."""

    ahead = AsyncRollout()

    def play_iteration(self, iteration: int, specs_of: Any) -> Rollout:
        episodes = []
        for index in range(4):
            turns = [make_turn(4, start=11 + 3 * index + iteration + number) for number in range(2)]
            for turn in turns:
                turn.logps[:] = ENGINE
            episode = make_episode(0, index, success=index < 2, iteration=iteration)
            episodes.append(replace(episode, turns=turns))
        return Rollout("train", iteration, episodes, [], {"other": 0.0})

    def close(self) -> None:
        """Nothing is under way."""


class Data(RolloutDataModule):
    def setup(self, stage: str) -> None:
        self.agent.bind(self._module.policy.tokenizer)
        self._runner = Played()  # type: ignore[assignment]


def data_of(**settings: Any) -> Data:
    filters = QualityFilters(keep_share=1.0, overlong=False, incomplete=False, repetitive=False, unreadable=False)
    chosen = {"replay": ReplayBuffer(schedule=Mix(ratio=1.0)), "filters": filters, **settings}
    return Data(MathProblems(), TranscriptAgent(), HuggingFaceEngine(), **chosen)


class Watch(Callback):
    """What each step's rows say of their generated tokens, and the policy before each iteration."""

    def __init__(self) -> None:
        self.before: list[Policy] = []
        self.fresh: list[Told] = []
        self.replay: list[Told] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.before.append(copy.deepcopy(pl_module.policy))
        self.fresh.append({})
        self.replay.append({})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Minibatch, batch_idx: int) -> None:
        for source, told in (("fresh", self.fresh[-1]), ("replay", self.replay[-1])):
            for each in batch.micro_batches[source]:
                for row, length in enumerate(each.attention_mask.sum(1).tolist()):
                    generated = each.turns[row] >= 0
                    weights = None if each.weights is None else each.weights[row][generated].tolist()
                    if generated.any():
                        ids = each.input_ids[row, :length].numpy().astype(np.int32).tobytes()
                        told[ids] = (each.old_logps[row][generated].tolist(), weights)


def train(module: SpearModule, data: Data, epochs: int = 2, **settings: Any) -> Watch:
    watch = Watch()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[watch], limit_val_batches=0, **{**quiet, **settings}
    )
    trainer.fit(module, datamodule=data)
    return watch


def module_of(policy: Policy, **correction: Any) -> SpearModule:
    sgd = partial(torch.optim.SGD, lr=0.5)
    return SpearModule(policy, optimizer=sgd, correction=RolloutCorrection(**correction), max_response_length=16)


def rows_in(data: Data) -> dict[str, Sample]:
    assert data.replay is not None
    return {entry["key"]: entry["payload"].with_advantage(1.0) for entry in data.replay.state_dict()["entries"]}


@pytest.mark.parametrize("cap", [None, 2.0])
def test_replayed_rows_carry_what_was_recomputed_when_they_were_fresh(tiny_policy: MakePolicy, cap: Any) -> None:
    watch = train(module_of(tiny_policy(), recompute=True, cap=cap), data_of())
    first, replayed = watch.fresh[0], watch.replay[1]
    assert len(replayed) == 2, "the successes of the first iteration"
    for ids, (logps, weights) in replayed.items():
        assert (logps, weights) == first[ids]
        assert (np.array(logps) != ENGINE).all()
        tokens = torch.tensor(np.frombuffer(ids, np.int32), dtype=torch.int64)[None]
        with torch.no_grad():
            now = watch.before[0](tokens, torch.ones_like(tokens), 1.0).logps[0].numpy()
        generated = np.concatenate([np.arange(4, 8), np.arange(12, 16)])
        np.testing.assert_allclose(logps, now[generated], atol=1e-4)
        if cap is None:
            assert weights is None
        else:
            np.testing.assert_allclose(weights, np.minimum(np.exp(now[generated] - ENGINE), cap), rtol=1e-3)


def test_without_recomputing_fresh_and_replayed_rows_carry_the_engines(tiny_policy: MakePolicy) -> None:
    watch = train(module_of(tiny_policy()), data_of())
    assert len(watch.replay[1]) == 2
    for told in (*watch.fresh, *watch.replay):
        assert all(value == ([float(ENGINE)] * 8, None) for value in told.values())


def test_a_checkpoint_keeps_what_was_recomputed(tiny_policy: MakePolicy) -> None:
    data, again = data_of(), data_of()
    train(module_of(tiny_policy(), recompute=True, cap=2.0), data, epochs=1)
    again.load_state_dict(data.state_dict())
    kept, found = rows_in(data), rows_in(again)
    assert kept.keys() == found.keys()
    assert len(kept) == 2
    for key, row in kept.items():
        assert row.weights is not None
        assert (row.logps[row.mask] != ENGINE).all()
        assert np.array_equal(found[key].logps, row.logps)
        assert np.array_equal(found[key].weights, row.weights)


def test_rows_are_recomputed_once_an_iteration(tiny_policy: MakePolicy) -> None:
    policy, passes = tiny_policy(), []
    policy.register_forward_pre_hook(lambda module, inputs: passes.append(torch.is_grad_enabled()))
    watch = train(module_of(policy, recompute=True), data_of(epochs=2, minibatches=2))
    assert passes.count(False) == 2, "one for all rows of each of two iterations"
    assert all(len(told) == 4 for told in watch.fresh)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_first_update_finds_what_was_recomputed(tiny_policy: MakePolicy, precision: Any) -> None:
    module = module_of(tiny_policy(), recompute=True)
    train(module, data_of(), epochs=1, precision=precision)
    metrics = module.trainer.callback_metrics
    assert metrics["rollout/logp_mismatch"] > 0.1
    assert metrics["update/max_log_ratio"] < 1e-5

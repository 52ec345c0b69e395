"""The update: what one optimizer step does to the weights, on hand-made rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from spear_lightning.algorithm import ClipCov, PPOClip
from spear_lightning.data.minibatches import IterationStream, StepPlan, build_minibatches
from spear_lightning.data.samples import Sample
from spear_lightning.metrics.store import MetricStore
from spear_lightning.policy.policy import Policy
from spear_lightning.training.correction import RolloutCorrection
from spear_lightning.training.hooks import UpdateHooks
from spear_lightning.training.learning_rate import LearningRateSchedule
from spear_lightning.training.module import SpearModule

SGD = partial(torch.optim.SGD, lr=0.5)
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def random_rows(count: int, seed: int = 0, prefix: str = "0") -> dict[str, Sample]:
    random = np.random.default_rng(seed)
    rows = {}
    for number in range(count):
        prompt, response = random.integers(2, 6), random.integers(1, 9)
        turns = np.concatenate([np.full(prompt, -1), np.zeros(response)]).astype(np.int16)
        rows[f"{prefix}/{number}"] = Sample(
            ids=random.integers(11, 30, prompt + response).astype(np.int32),
            mask=turns >= 0,
            logps=np.where(turns >= 0, random.normal(-3, 0.3, prompt + response), 0).astype(np.float32),
            advantages=np.where(turns >= 0, random.normal(), 0).astype(np.float32),
            turns=turns,
        )
    return rows


def minibatches_of(fresh, replay=None, *, max_tokens=10_000, minibatches=1):
    return build_minibatches(
        fresh,
        replay or {},
        plan=StepPlan(minibatches),
        max_tokens=max_tokens,
        pad_id=0,
        temperature=1.0,
        seed=1,
        iteration=0,
    )


def train(module: SpearModule, minibatches, callbacks=(), epochs=1) -> Trainer:
    stream = IterationStream(lambda: iter(minibatches), len(minibatches))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, train_dataloaders=stream)
    return trainer


def weights_after(policy: Policy, minibatches, **arguments) -> torch.Tensor:
    defaults = {"optimizer": SGD, "max_grad_norm": None, "max_response_length": 16}
    imitation = arguments.pop("imitation_weight", 1.0)
    module = SpearModule(policy, **{**defaults, **arguments})
    module.imitation_weight = imitation
    train(module, minibatches)
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), max_tokens=st.integers(1, 50), aggregation=st.sampled_from(AGGREGATIONS))
def test_the_cut_into_micro_batches_does_not_show(tiny_policy: Callable[..., Policy], seed, max_tokens, aggregation):
    fresh, replay = random_rows(7, seed), random_rows(3, seed + 100, "replayed")
    whole = weights_after(tiny_policy("qwen2"), minibatches_of(fresh, replay), aggregation=aggregation)
    pieces = minibatches_of(fresh, replay, max_tokens=max_tokens)
    assert len(pieces[0].micro_batches["fresh"]) > 1
    cut = weights_after(tiny_policy("qwen2"), pieces, aggregation=aggregation)
    before = torch.cat([parameter.detach().flatten() for parameter in tiny_policy("qwen2").parameters()])
    update = float((whole - before).abs().max())
    assert update > 1e-4
    torch.testing.assert_close(cut, whole, rtol=0, atol=3e-6 * update)  # sums of gradients round with their size


def test_tokens_outside_the_mask_have_no_influence(tiny_policy):
    rows = random_rows(5)
    spoiled = dict(rows)
    masked = spoiled["0/1"]
    for row in (masked, rows["0/2"]):
        row.mask[:] = False
    expected = weights_after(
        tiny_policy("qwen2"), minibatches_of({k: r for k, r in rows.items() if k not in ("0/1", "0/2")})
    )
    masked.advantages[:] = 1e6
    masked.logps[:] = -50
    torch.testing.assert_close(weights_after(tiny_policy("qwen2"), minibatches_of(spoiled)), expected, rtol=0, atol=0)


def test_replay_enters_with_its_weight(tiny_policy):
    fresh, replay = random_rows(4), random_rows(4, 7, "replayed")
    start = torch.cat([parameter.detach().flatten() for parameter in tiny_policy("qwen2").parameters()])
    alone = weights_after(tiny_policy("qwen2"), minibatches_of(fresh)) - start
    off = weights_after(tiny_policy("qwen2"), minibatches_of(fresh, replay), imitation_weight=0.0) - start
    half = weights_after(tiny_policy("qwen2"), minibatches_of(fresh, replay), imitation_weight=0.5) - start
    full = weights_after(tiny_policy("qwen2"), minibatches_of(fresh, replay)) - start
    torch.testing.assert_close(off, alone, rtol=0, atol=0)
    assert (full - alone).abs().max() > 1e-4
    torch.testing.assert_close(half - alone, (full - alone) / 2, rtol=1e-3, atol=1e-6)


def test_replayed_rows_have_a_loss_of_their_own(tiny_policy):
    replay = random_rows(4, 7, "replayed")
    ppo = weights_after(tiny_policy("qwen2"), minibatches_of({}, replay), loss=PPOClip())
    everything_dropped = ClipCov(ratio=1.0, lower=-1e9, upper=1e9)
    dropped = weights_after(
        tiny_policy("qwen2"), minibatches_of({}, replay), loss=PPOClip(), replay_loss=everything_dropped
    )
    start = torch.cat([parameter.detach().flatten() for parameter in tiny_policy("qwen2").parameters()])
    assert (ppo - start).abs().max() > 1e-4
    torch.testing.assert_close(dropped, start, rtol=0, atol=0)


def test_a_minibatch_without_signal_is_skipped_and_counted(tiny_policy):
    rows = {key: row.with_advantage(0.0) for key, row in random_rows(4).items()}
    policy = tiny_policy("qwen2")
    before = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    module = SpearModule(policy, optimizer=SGD, max_response_length=16)
    trainer = train(module, [*minibatches_of(rows), *minibatches_of(random_rows(2)), *minibatches_of({})])
    assert trainer.callback_metrics["update/skipped"] == 2
    assert trainer.callback_metrics["update/steps"] == 1
    assert module.weight_version == 1
    after = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    assert (after - before).abs().max() > 0


def test_regularisers_alone_are_signal(tiny_policy):
    rows = {key: row.with_advantage(0.0) for key, row in random_rows(4).items()}
    policy = tiny_policy("qwen2")
    module = SpearModule(policy, optimizer=SGD, max_response_length=16, entropy_bonus=0.1)
    entropies = []

    class Watch(Callback, UpdateHooks):
        def on_micro_batch_end(self, trainer, pl_module, output):
            entropies.append((output.entropies * output.mask).sum() / output.mask.sum())

    train(module, minibatches_of(rows) * 5, [Watch()])
    assert entropies[-1] > entropies[0]


def test_the_reference_holds_the_policy_back(tiny_policy):
    rows = random_rows(6)
    steps = minibatches_of(rows) * 6
    start = torch.cat([parameter.detach().flatten() for parameter in tiny_policy("qwen2").parameters()])
    optimizer = partial(torch.optim.SGD, lr=0.01)
    free = weights_after(tiny_policy("qwen2"), steps, optimizer=optimizer) - start
    held = weights_after(tiny_policy("qwen2"), steps, optimizer=optimizer, reference_kl=1.0) - start
    assert held.norm() < free.norm()


def test_recomputed_log_probabilities_of_an_exact_engine_change_nothing(tiny_policy):
    rows = random_rows(5)
    policy = tiny_policy("qwen2")
    for batch in minibatches_of(rows, max_tokens=1)[0].micro_batches["fresh"]:
        with torch.no_grad():
            logps = policy(batch.input_ids, batch.attention_mask, 1.0, loss_mask=batch.response_mask > 0).logps[0]
        row = next(row for row in rows.values() if row.ids.tolist() == batch.input_ids[0].tolist())
        row.logps[:] = logps.numpy()
    steps = minibatches_of(rows, minibatches=2)
    as_played = weights_after(tiny_policy("qwen2"), steps)
    module = SpearModule(
        tiny_policy("qwen2"),
        optimizer=SGD,
        max_grad_norm=None,
        max_response_length=16,
        correction=RolloutCorrection(recompute=True, cap=2.0),
    )
    passing = {"pad_id": 0, "max_tokens": 10_000, "temperature": 1.0}
    corrected = module.correction.apply(rows, module.policy, module.device, MetricStore(), **passing)
    train(module, minibatches_of(corrected, minibatches=2))
    again = torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])
    torch.testing.assert_close(again, as_played, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_and_the_norm_before_is_logged(tiny_policy):
    policy = tiny_policy("qwen2")
    before = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    module = SpearModule(policy, optimizer=partial(torch.optim.SGD, lr=1.0), max_grad_norm=1e-3, max_response_length=16)
    trainer = train(module, minibatches_of(random_rows(4)))
    after = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    assert trainer.callback_metrics["update/grad_norm"] > 1e-2
    assert (after - before).norm() == pytest.approx(1e-3, rel=1e-2)


def test_the_learning_rate_follows_the_update(tiny_policy):
    module = SpearModule(
        tiny_policy("qwen2"), optimizer=SGD, max_response_length=16, learning_rate=LearningRateSchedule(warmup=4)
    )
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(module, minibatches_of(random_rows(4)) * 5, [Watch()])
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": partial(torch.optim.SGD, lr=0.0)}, "learning rate of 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"reference_kl": -1.0}, "reference_kl"),
    ],
)
def test_settings_that_cannot_train_are_named(tiny_policy, arguments, message):
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        train(
            SpearModule(tiny_policy("qwen2"), **{"optimizer": SGD, "max_response_length": 16, **arguments}),
            minibatches_of(random_rows(2)),
        )


def test_a_checkpoint_of_another_model_is_refused(tiny_policy, tmp_path):
    module = SpearModule(tiny_policy("llama"), optimizer=SGD, max_response_length=16)
    train(module, minibatches_of(random_rows(2))).save_checkpoint(tmp_path / "a.ckpt")
    other = SpearModule(tiny_policy("qwen2"), optimizer=SGD, max_response_length=16)
    with pytest.raises(MisconfigurationException, match="of another model"):
        other.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=False))
    with pytest.raises(MisconfigurationException, match="not written by spear fit"):
        other.on_load_checkpoint({})


def test_replayed_rows_have_steps_of_their_own_after_the_fresh_ones():
    fresh, replay = random_rows(10), random_rows(7, seed=1, prefix="r")
    plan = StepPlan(samples=4, epochs=2, replay="own")
    assert plan.most(12, 8) == 10
    steps = build_minibatches(
        fresh, replay, plan=plan, length=plan.most(12, 8), max_tokens=64, pad_id=0, temperature=1.0, seed=1, iteration=0
    )

    def rows(batches):
        return sum(int((batch.response_mask.sum(1) > 0).sum()) for batch in batches)

    assert [rows(step.micro_batches["fresh"]) for step in steps] == [4, 3, 3, 4, 3, 3, 0, 0, 0, 0]
    assert [rows(step.micro_batches["replay"]) for step in steps] == [0, 0, 0, 0, 0, 0, 4, 3, 4, 3]
    assert [step.steps for step in steps] == [{"fresh": 6, "replay": 0}] * 6 + [{"fresh": 0, "replay": 4}] * 4
    without = build_minibatches(
        fresh, {}, plan=plan, length=10, max_tokens=64, pad_id=0, temperature=1.0, seed=1, iteration=0
    )
    assert [step.steps["fresh"] for step in without] == [6] * 6 + [0] * 4
    assert not any(step.steps["replay"] for step in without)


def test_a_step_that_there_was_nothing_to_fill_with_is_no_skipped_update(tiny_policy):
    module = SpearModule(tiny_policy("qwen2"), optimizer=SGD, max_response_length=16)
    steps = build_minibatches(
        random_rows(6), {}, plan=StepPlan(2), length=5, max_tokens=99, pad_id=0, temperature=1.0, seed=1, iteration=0
    )
    assert len(steps) == 5
    trainer = train(module, steps)
    assert trainer.callback_metrics["update/steps"] == 2
    assert trainer.callback_metrics["update/skipped"] == 0
    mean = trainer.callback_metrics["update/loss"]
    again = SpearModule(tiny_policy("qwen2"), optimizer=SGD, max_response_length=16)
    torch.testing.assert_close(train(again, steps[:2]).callback_metrics["update/loss"], mean)  # over real steps

import math
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from spear_lightning.callbacks import EntropyMonitor
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_episode, make_trainer, make_turn


def fit(folder: Path, monitor: EntropyMonitor, script: Script, **arguments: Any) -> tuple[Any, list[str]]:
    trainer = make_trainer(folder, [monitor], **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(TinyModule(), datamodule=TinyData(script))
    return trainer, [str(item.message) for item in caught if "entropy has" in str(item.message)]


def test_the_mean_is_over_tokens_and_by_position(tmp_path: Path) -> None:
    episodes = [
        make_episode([make_turn([1.0, 2.0]), make_turn([4.0])]),
        make_episode([make_turn([3.0]), make_turn([6.0, 8.0, 10.0]), make_turn([]), make_turn([0.5, math.nan])]),
    ]
    script = Script(rollouts={("train", 0): episodes})
    trainer, _ = fit(tmp_path, EntropyMonitor(positions=[1, 2, 3, 5]), script, max_epochs=1)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if "rollout" in name}
    assert metrics == pytest.approx(
        {
            "entropy/rollout": np.mean([1, 2, 4, 3, 6, 8, 10, 0.5]),
            "entropy/rollout/turn_1": np.mean([1, 2, 3]),
            "entropy/rollout/turn_2": np.mean([4, 6, 8, 10]),
            "entropy/rollout/turns_3-4": 0.5,
        }
    )


def test_the_update_is_measured_on_live_tokens_fresh_and_replayed_apart(tmp_path: Path) -> None:
    script = Script(entropies=[0.2, 0.6], update_entropies=[0.3, 0.4], batches=3)
    trainer, _ = fit(tmp_path, EntropyMonitor(positions=[1, 2, 4]), script, max_epochs=2)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if "rollout" not in name}
    # of the last iteration only: tokens at 0.4, 0.4 (turn 1) and 1.2 (turn 3); the masked NaN is not seen
    for phase in ("update", "replay"):
        assert metrics[f"entropy/{phase}"] == pytest.approx(2 / 3)
        assert metrics[f"entropy/{phase}/turn_1"] == pytest.approx(0.4)
        assert metrics[f"entropy/{phase}/turns_2-3"] == pytest.approx(1.2)
        assert f"entropy/{phase}/turns_4+" not in metrics


def test_turns_before_the_first_position_count_in_the_whole_only(tmp_path: Path) -> None:
    script = Script(rollouts={("train", 0): [make_episode([make_turn([1.0]), make_turn([3.0])])]})
    trainer, _ = fit(tmp_path, EntropyMonitor(positions=[2]), script, max_epochs=1)
    assert trainer.callback_metrics["entropy/rollout"].item() == 2.0
    assert trainer.callback_metrics["entropy/rollout/turns_2+"].item() == 3.0
    trainer, _ = fit(tmp_path, EntropyMonitor(positions=[]), script, max_epochs=1)
    assert {name for name in trainer.callback_metrics if "rollout" in name} == {"entropy/rollout"}


def test_a_bad_token_of_one_turn_does_not_spoil_the_others(tmp_path: Path) -> None:
    monitor = EntropyMonitor(positions=[1, 2], patience=1)
    monitor._add("rollout", torch.tensor([1.0, math.inf]), torch.tensor([0, 1]), torch.tensor([1, 1]))
    sums = monitor._sums["rollout"]
    assert sums[0, 1] == 1.0
    assert math.isinf(sums[0, 0])
    assert sums[1].tolist() == [2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("bounds", "entropies", "word", "iterations"),
    [
        ({"lower": 0.1}, [1.0, 0.05], "collapsed: below lower=0.1", 4),
        ({"upper": 2.0}, [1.0, 1.0, 3.0], "exploded: above upper=2", 5),
        ({"lower": None, "relative_lower": 0.5}, [1.0, 0.4], "collapsed: below relative_lower=0.5", 4),
        ({"relative_upper": 2.0}, [1.0, 2.5], "exploded: above relative_upper=2", 4),
        ({}, [1.0, math.inf], "exploded: it is not finite", 4),
    ],
)
def test_it_stops_after_patience(
    tmp_path: Path, bounds: dict[str, Any], entropies: list[float], word: str, iterations: int
) -> None:
    monitor = EntropyMonitor(**bounds, patience=3, action="stop")
    trainer, messages = fit(tmp_path, monitor, Script(entropies=entropies), max_epochs=20)
    assert trainer.current_epoch == iterations
    assert len(messages) == 1
    assert word in messages[0]
    assert f"for 3 iterations up to iteration {iterations - 1}" in messages[0]
    assert f"{entropies[-1]:.4g}, {entropies[-1]:.4g}, {entropies[-1]:.4g}" in messages[0]
    assert "Training stops" in messages[0]


def test_an_iteration_within_bounds_starts_the_count_again(tmp_path: Path) -> None:
    script = Script(entropies=[1.0, 0.05, 0.05, 1.0, 0.05, 0.05, 1.0])
    trainer, messages = fit(tmp_path, EntropyMonitor(lower=0.1, patience=3, action="stop"), script, max_epochs=8)
    assert trainer.current_epoch == 8
    assert messages == []


def test_collapse_and_explosion_do_not_add_up(tmp_path: Path) -> None:
    script = Script(entropies=[1.0, 0.05, 9.0, 0.05, 1.0])
    trainer, messages = fit(tmp_path, EntropyMonitor(patience=2, lower=0.1, action="stop"), script, max_epochs=6)
    assert trainer.current_epoch == 6
    assert messages == []


def test_a_warning_lets_training_go_on_and_is_not_repeated_every_time(tmp_path: Path) -> None:
    trainer, messages = fit(tmp_path, EntropyMonitor(lower=0.1, patience=2), Script(entropies=[0.05]), max_epochs=5)
    assert trainer.current_epoch == 5
    assert ["for 2 iterations" in messages[0], "for 4 iterations" in messages[1]] == [True, True]
    assert len(messages) == 2
    assert all("Training goes on" in message for message in messages)


def test_entropy_of_the_update_is_judged_where_the_engine_tells_none(tmp_path: Path) -> None:
    script = Script(entropies=[math.nan], update_entropies=[0.01])
    trainer, messages = fit(tmp_path, EntropyMonitor(lower=0.1, patience=2, action="stop"), script, max_epochs=9)
    assert trainer.current_epoch == 2
    assert "from the update" in messages[0]
    assert "entropy/rollout" not in trainer.callback_metrics


def test_none_switches_a_bound_off(tmp_path: Path) -> None:
    monitor = EntropyMonitor(lower=None, upper=None, patience=1, action="stop")
    trainer, messages = fit(tmp_path, monitor, Script(entropies=[0.0, 50.0]), max_epochs=3)
    assert trainer.current_epoch == 3
    assert messages == []


def test_resuming_continues_the_count(tmp_path: Path) -> None:
    def monitor() -> EntropyMonitor:
        return EntropyMonitor(lower=None, relative_lower=0.5, patience=4, action="stop")

    script = Script(entropies=[1.0, 0.1])
    first, _ = fit(tmp_path, monitor(), script, max_epochs=3)
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(tmp_path, [monitor()], max_epochs=20)
    with pytest.warns(UserWarning, match="for 4 iterations up to iteration 4"):
        trainer.fit(TinyModule(), datamodule=TinyData(script), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert trainer.current_epoch == 5


def test_a_checkpoint_made_by_the_validation_has_the_verdict_of_its_iteration(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    monitor = EntropyMonitor(lower=0.1, patience=9)
    trainer = make_trainer(tmp_path, [monitor, checkpoint], limit_val_batches=1.0, enable_checkpointing=True)
    trainer.fit(TinyModule(), datamodule=TinyData(Script(entropies=[0.05])))
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"]["EntropyMonitor"]
    assert state == {"first": pytest.approx(0.05), "out_of_bounds": [pytest.approx(0.05)], "which": "collapsed"}


def test_an_iteration_cut_short_is_judged_too(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, EntropyMonitor(), Script(batches=5), max_epochs=-1, max_steps=3)
    assert trainer.callback_metrics["entropy/update"].item() == pytest.approx(5 / 3)


def test_values_reach_the_loggers_at_their_iteration_before_its_checkpoint(tmp_path: Path) -> None:
    class Saved(Callback):
        seen: ClassVar[list[Any]] = []

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            self.seen.append(dict(logged))

    logged: dict[int, float] = {}
    logger = CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step: logged.update({step: metrics.get("entropy/rollout", logged.get(step))})
    saver = ModelCheckpoint(dirpath=tmp_path, save_on_train_epoch_end=False)
    trainer = make_trainer(
        tmp_path, [EntropyMonitor(), Saved(), saver], logger=logger, limit_val_batches=1.0, enable_checkpointing=True
    )
    trainer.fit(TinyModule(), datamodule=TinyData(Script(entropies=[1.0, 2.0])))
    assert Saved.seen == [{0: 1.0}, {0: 1.0, 1: 2.0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lower": -1.0}, "lower must be at least 0"),
        ({"relative_upper": math.nan}, "relative_upper must be at least 0"),
        ({"lower": 2.0, "upper": 1.0}, "lower=2.0 must be below upper=1.0"),
        ({"relative_lower": 2.0, "relative_upper": 1.0}, "relative_lower=2.0 must be below"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"action": "explode"}, "action must be one of warn, stop, not explode"),
        ({"positions": [0, 1]}, "positions must be increasing turn numbers from 1"),
        ({"positions": [3, 2]}, "positions must be increasing turn numbers from 1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=rf"EntropyMonitor(: |\.){message}"):
        EntropyMonitor(**arguments)

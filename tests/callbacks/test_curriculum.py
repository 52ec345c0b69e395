import math
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule

from spear_lightning.algorithm.schedules import Constant, Zero
from spear_lightning.callbacks import CurriculumSchedule
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_trainer

REPLAY = object()  # the callback asks only whether there is one


def test_weights_are_set_before_the_rollout_of_their_iteration(tmp_path: Path) -> None:
    data = TinyData(replay=REPLAY)
    curriculum = CurriculumSchedule(imitation_warmup=4, tool_reward_decay=2, imitation_max=0.5)
    trainer = make_trainer(tmp_path, [curriculum], max_epochs=6)
    trainer.fit(TinyModule(), datamodule=data)
    gamma = [0.5 * 0.5 * (1 - math.cos(math.pi * t / 4)) for t in range(5)] + [0.5]
    mu = [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    assert [weights[0] for weights in data.weights] == pytest.approx(gamma)
    assert [weights[1] for weights in data.weights] == pytest.approx(mu, abs=1e-12)
    assert trainer.callback_metrics["curriculum/imitation_weight"].item() == pytest.approx(0.5)
    assert trainer.callback_metrics["curriculum/tool_reward_weight"].item() == 0.0


def test_without_it_and_after_it_the_weights_are_one_and_zero(tmp_path: Path) -> None:
    data, module = TinyData(replay=REPLAY), TinyModule()
    make_trainer(tmp_path, [CurriculumSchedule(10, 10)]).fit(module, datamodule=data)
    assert (module.imitation_weight, data.tool_reward_weight) == (1.0, 0.0)
    data.weights.clear()
    make_trainer(tmp_path).fit(module, datamodule=data)
    assert data.weights == [(1.0, 0.0)] * 2


def test_weights_are_put_back_after_an_error(tmp_path: Path) -> None:
    class Fails(TinyModule):
        def training_step(self, batch: float, batch_idx: int) -> None:
            raise RuntimeError("out of memory")

    data, module = TinyData(replay=REPLAY), Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, [CurriculumSchedule(10, 10)]).fit(module, datamodule=data)
    assert data.weights == [(0.0, 1.0)]
    assert (module.imitation_weight, data.tool_reward_weight) == (1.0, 0.0)


def test_resuming_continues_the_schedule_where_it_was(tmp_path: Path) -> None:
    whole, part = TinyData(replay=REPLAY), TinyData(replay=REPLAY)
    make_trainer(tmp_path, [CurriculumSchedule(4, 4)], max_epochs=4).fit(TinyModule(), datamodule=whole)
    first = make_trainer(tmp_path, [CurriculumSchedule(4, 4)], max_epochs=2)
    first.fit(TinyModule(), datamodule=part)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = make_trainer(tmp_path, [CurriculumSchedule(4, 4)], max_epochs=4)
    second.fit(TinyModule(), datamodule=part, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=False)
    assert part.weights == whole.weights


def test_other_schedules_can_be_given() -> None:
    curriculum = CurriculumSchedule(imitation=Constant(0.3), tool_reward=Zero())
    assert curriculum.imitation(0) == 0.3
    assert curriculum.tool_reward(0) == 0.0
    assert CurriculumSchedule(tool_reward_decay=0).tool_reward(0) == 0.0
    assert CurriculumSchedule(imitation_warmup=0).imitation(0) == 1.0


def test_a_missing_replay_buffer_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    data = TinyData(replay=None)
    with pytest.raises(MisconfigurationException, match=r"data\.replay.*ReplayBuffer"):
        make_trainer(tmp_path, [CurriculumSchedule()]).fit(TinyModule(), datamodule=data)
    assert data.weights == []


@pytest.mark.parametrize("curriculum", [CurriculumSchedule(imitation_max=0.0), CurriculumSchedule(imitation=Zero())])
def test_the_tool_reward_alone_needs_no_replay_buffer(tmp_path: Path, curriculum: CurriculumSchedule) -> None:
    data = TinyData(replay=None)
    make_trainer(tmp_path, [curriculum]).fit(TinyModule(), datamodule=data)
    assert [gamma for gamma, _ in data.weights] == [0.0, 0.0]


def test_validation_alone_needs_no_replay_buffer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [CurriculumSchedule()], limit_val_batches=1.0)
    trainer.validate(TinyModule(), datamodule=TinyData(Script()), verbose=False)


def test_a_foreign_module_is_told_what_is_missing(tmp_path: Path) -> None:
    class Foreign(LightningModule):
        def training_step(self, batch: object, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(MisconfigurationException, match=r"imitation_weight.*Foreign"):
        make_trainer(tmp_path, [CurriculumSchedule()]).fit(Foreign(), datamodule=TinyData(replay=REPLAY))

    class ForeignData(TinyData):
        def __init__(self) -> None:
            LightningDataModule.__init__(self)
            self.script = Script()

    with pytest.raises(MisconfigurationException, match=r"tool_reward_weight.*ForeignData"):
        make_trainer(tmp_path, [CurriculumSchedule()]).fit(TinyModule(), datamodule=ForeignData())


@pytest.mark.parametrize("name", ["imitation_warmup", "tool_reward_decay", "imitation_max", "tool_reward_max"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_arguments_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(MisconfigurationException, match=f"CurriculumSchedule: {name} must be 0 or more"):
        CurriculumSchedule(**{name: value})  # type: ignore[arg-type]

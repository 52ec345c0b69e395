import math
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule

from spear_lightning.algorithm import Constant, Zero
from spear_lightning.callbacks import CurriculumSchedule
from spear_lightning.callbacks import curriculum as curriculum_module
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
    with pytest.raises(ValueError, match=rf"CurriculumSchedule\.{name} must be at least 0"):
        CurriculumSchedule(**{name: value})  # type: ignore[arg-type]


def weights(tmp_path: Path, *curricula: CurriculumSchedule) -> list[tuple[float, float]]:
    data = TinyData(replay=REPLAY)
    make_trainer(tmp_path, curricula, max_epochs=4).fit(TinyModule(), datamodule=data)
    return data.weights


def test_of_several_the_last_acts_and_takes_over_what_it_leaves_open(tmp_path: Path) -> None:
    def first() -> CurriculumSchedule:
        return CurriculumSchedule(imitation_warmup=2, tool_reward_decay=3, imitation_max=0.5, tool_reward_max=0.1)

    for later, alone in (
        (CurriculumSchedule(), first()),
        (CurriculumSchedule(imitation_warmup=4), CurriculumSchedule(4, 3, 0.5, 0.1)),
        (CurriculumSchedule(tool_reward_max=2.0), CurriculumSchedule(2, 3, 0.5, 2.0)),
        (CurriculumSchedule(tool_reward=Zero()), CurriculumSchedule(2, 3, 0.5, tool_reward=Zero())),
        (CurriculumSchedule(imitation=Constant(0.3)), CurriculumSchedule(2, 3, 0.5, 0.1, Constant(0.3))),
    ):
        assert weights(tmp_path, first(), later) == weights(tmp_path, alone)
    # What is asked for by number stands above a schedule asked for before it.
    assert weights(tmp_path, CurriculumSchedule(imitation=Zero()), CurriculumSchedule(2), CurriculumSchedule()) == (
        weights(tmp_path, CurriculumSchedule(2))
    )


def test_of_several_only_the_last_logs_and_puts_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(curriculum_module, "log_iteration", lambda trainer, module, values: logged.append(values))
    data, module = TinyData(replay=REPLAY), TinyModule()
    module.imitation_weight = 0.7
    both = [CurriculumSchedule(2, 2), CurriculumSchedule(imitation_max=0.5)]
    make_trainer(tmp_path, both, max_epochs=3).fit(module, datamodule=data)
    assert [values["curriculum/imitation_weight"] for values in logged] == pytest.approx([0.0, 0.25, 0.5])
    assert [values["curriculum/tool_reward_weight"] for values in logged] == pytest.approx([1.0, 0.5, 0.0])
    assert (module.imitation_weight, data.tool_reward_weight) == (0.7, 0.0)


def test_only_the_last_of_several_asks_for_a_replay_buffer(tmp_path: Path) -> None:
    data = TinyData(replay=None)
    both = [CurriculumSchedule(), CurriculumSchedule(imitation=Zero())]
    make_trainer(tmp_path, both).fit(TinyModule(), datamodule=data)
    assert [gamma for gamma, _ in data.weights] == [0.0, 0.0]
    with pytest.raises(MisconfigurationException, match=r"data\.replay"):
        make_trainer(tmp_path, [*both[::-1], CurriculumSchedule(imitation_warmup=3)]).fit(TinyModule(), datamodule=data)


def test_without_arguments_it_is_the_published_curriculum() -> None:
    curriculum = CurriculumSchedule()
    assert [curriculum.imitation(t) for t in (0, 100, 200, 300)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert [curriculum.tool_reward(t) for t in (0, 100, 200, 300)] == pytest.approx([1.0, 0.5, 0.0, 0.0])

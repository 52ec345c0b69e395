import doctest
import importlib
import pkgutil
from itertools import combinations
from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import spear_lightning.callbacks as package
from spear_lightning.callbacks import (
    CurriculumSchedule,
    EntropyMonitor,
    LearningCurve,
    RolloutLog,
    RolloutProgress,
    ThroughputMonitor,
)
from tests.callbacks.tiny import TinyData, TinyModule, make_trainer

ALL = [CurriculumSchedule, EntropyMonitor, LearningCurve, RolloutLog, RolloutProgress, ThroughputMonitor]
# All subsets of those that act on what they see; the one that only reads clocks alone and with all others.
SUBSETS = [subset for size in range(len(ALL)) for subset in combinations(ALL[:-1], size)] + [(ALL[-1],), tuple(ALL)]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(kind.__name__ for kind in subset) or "none")
def test_any_subset_works_and_leaves_training_as_it_is(tmp_path: Path, subset: tuple[type, ...]) -> None:
    data, module = TinyData(replay=object()), TinyModule()
    trainer = make_trainer(
        tmp_path, [kind() for kind in subset], limit_val_batches=1.0, num_sanity_val_steps=-1, enable_checkpointing=True
    )
    trainer.fit(module, datamodule=data)
    assert trainer.current_epoch == 2
    # plain SGD on (w - 1)²: four steps of 0.1
    assert module.weight.tolist() == pytest.approx([1 - 0.8**4] * 2)
    logged = {name.split("/")[0] for name in trainer.callback_metrics}
    assert ("curriculum" in logged) == (CurriculumSchedule in subset)
    assert ("entropy" in logged) == (EntropyMonitor in subset)
    assert ("time" in logged) == (ThroughputMonitor in subset)
    assert ((tmp_path / "evaluations.json").exists()) == (LearningCurve in subset)
    assert ((tmp_path / "rollouts").exists()) == (RolloutLog in subset)
    assert (data.weights[0] == (0.0, 1.0)) == (CurriculumSchedule in subset)


def test_lightnings_own_callbacks_work_beside_them(tmp_path: Path) -> None:
    callbacks = [
        *(kind() for kind in ALL),
        EarlyStopping("entropy/rollout", patience=1, check_on_train_epoch_end=True),
        ModelCheckpoint(dirpath=tmp_path, monitor="entropy/rollout", save_last=True, save_on_train_epoch_end=True),
        LearningRateMonitor(),
    ]
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tensorboard")]
    trainer = make_trainer(
        tmp_path, callbacks, logger=loggers, enable_checkpointing=True, limit_val_batches=1.0, max_epochs=9
    )
    trainer.fit(TinyModule(), datamodule=TinyData(replay=object()))
    assert trainer.current_epoch == 2, "the entropy never fell: EarlyStopping ends it"
    again = make_trainer(
        tmp_path, [kind() for kind in ALL], limit_val_batches=1.0, max_epochs=3, enable_checkpointing=True
    )
    again.fit(TinyModule(), datamodule=TinyData(replay=object()), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert again.current_epoch == 3


def test_they_are_composed_in_yaml_by_class_path_and_refuse_unknown_keys(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    config = {
        "callbacks": [
            {
                "class_path": "spear_lightning.callbacks.CurriculumSchedule",
                "init_args": {
                    "imitation_warmup": 7,
                    "tool_reward": {"class_path": "Constant", "init_args": {"value": 0.5}},
                },
            },
            {"class_path": "EntropyMonitor", "init_args": {"lower": None, "action": "stop", "positions": [1, 4]}},
            {"class_path": "LearningCurve", "init_args": {"directory": str(tmp_path)}},
            {"class_path": "RolloutLog", "init_args": {"splits": ["train", "test"]}},
            {"class_path": "RolloutProgress"},
            {"class_path": "spear_lightning.callbacks.ThroughputMonitor", "init_args": {"peak_flops": "measure"}},
        ]
    }
    parsed = parser.parse_object(config)
    curriculum, monitor, curve, log, progress, throughput = parser.instantiate_classes(parsed).callbacks
    assert (curriculum.imitation.horizon, curriculum.tool_reward(9)) == (7, 0.5)
    assert (monitor.lower, monitor.action, monitor.positions) == (None, "stop", (1, 4))
    assert curve.directory == tmp_path
    assert log.splits == ("train", "test")
    assert isinstance(progress, RolloutProgress)
    assert throughput.peak_flops == "measure"
    text = parser.dump(parsed, skip_none=False)  # as LightningCLI does: null switches a bound off
    assert parser.dump(parser.parse_string(text), skip_none=False) == text
    with pytest.raises(ArgumentError, match="patiense"):
        parser.parse_object({"callbacks": [{"class_path": "EntropyMonitor", "init_args": {"patiense": 3}}]})
    with pytest.raises(ArgumentError, match="splits"):
        parser.parse_object({"callbacks": [{"class_path": "RolloutLog", "init_args": {"splits": ["dev"]}}]})


def test_fast_dev_run_works(tmp_path: Path) -> None:
    callbacks = [
        CurriculumSchedule(),
        EntropyMonitor(),
        LearningCurve(tmp_path),
        RolloutLog(tmp_path),
        RolloutProgress(),
    ]
    trainer = Trainer(fast_dev_run=True, callbacks=callbacks, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(TinyModule(), datamodule=TinyData(replay=object()))
    assert trainer.current_epoch == 1


def test_everything_is_exported() -> None:
    assert sorted(package.__all__) == package.__all__
    assert {kind.__name__ for kind in ALL} <= set(package.__all__)


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(package.__path__)])
def test_the_examples_in_the_documentation_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"{package.__name__}.{name}")
    assert doctest.testmod(module).failed == 0
    for kind in ALL:
        if kind.__module__ == module.__name__:
            assert ">>> " in (kind.__doc__ or ""), f"{kind.__name__} has no example"

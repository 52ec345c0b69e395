"""What docs/algorithm.md names is there: classes, functions, methods, and keys of the configuration."""

import inspect
import re
from pathlib import Path

import pytest

from spear_lightning import algorithm
from spear_lightning.algorithm import QualityFilters, RewardBaseline, RewardComposer
from spear_lightning.callbacks import CurriculumSchedule
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.correction import RolloutCorrection
from spear_lightning.training.datamodule import RolloutDataModule
from spear_lightning.training.module import SpearModule

TEXT = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text("utf-8")
OWNERS = {
    "model": SpearModule,
    "data": RolloutDataModule,
    "data.reward": RewardComposer,
    "data.filters": QualityFilters,
    "data.baseline": RewardBaseline,
    "data.rollouts": TrainingRollouts,
    "model.correction": RolloutCorrection,
    "CurriculumSchedule": CurriculumSchedule,
}
KEYS = sorted(set(re.findall(r"`((?:model|data|CurriculumSchedule)(?:\.\w+)+)", TEXT)))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_an_argument(key):
    owner, name = key.rsplit(".", 1)
    assert name in inspect.signature(OWNERS[owner]).parameters


def test_every_key_was_found():
    assert len(KEYS) > 30


def in_code():
    """Names in the columns "In code", "Class" and "Function" of the tables."""
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines())
        for column in {"In code", "Class", "Function"} & set(head):
            for row in rows:
                yield from re.findall(r"`(\w+(?:\.\w+)?)", row[head.index(column)])


def test_every_name_in_code_is_public():
    names = set(in_code())
    assert len(names) > 35
    for name in names:
        owner, _, member = name.partition(".")
        assert hasattr(algorithm, owner), name
        thing = getattr(algorithm, owner)
        assert not member or hasattr(thing, member) or member in thing.__annotations__, name


def test_every_estimator_loss_and_schedule_is_named():
    bases = (algorithm.PolicyLoss, algorithm.AdvantageEstimator, algorithm.Recalibration, algorithm.ReplaySchedule)
    classes = {name for name, thing in vars(algorithm).items() if inspect.isclass(thing) and issubclass(thing, bases)}
    assert classes - {base.__name__ for base in bases} <= set(in_code())

"""The classes that a configuration names by class path can be named so, and say what is wrong where they cannot."""

import importlib
from pkgutil import iter_modules

import pytest
from jsonargparse import ArgumentParser

from spear_lightning import algorithm
from spear_lightning.algorithm import (
    AdvantageEstimator,
    PolicyLoss,
    QualityFilters,
    ReplayBuffer,
    RewardComposer,
    Schedule,
)

MODULES = [importlib.import_module(f"spear_lightning.algorithm.{one.name}") for one in iter_modules(algorithm.__path__)]


def test_every_public_function_and_class_can_be_imported_from_the_package():
    public = {
        name: thing
        for module in MODULES
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    }
    assert len(MODULES) == 7
    assert len(public) > 50
    assert {name: getattr(algorithm, name, None) for name in public} == public


class Parts:
    def __init__(
        self,
        loss: PolicyLoss,
        advantage: AdvantageEstimator,
        rewards: RewardComposer,
        filters: QualityFilters,
        mu: Schedule,
        replay: ReplayBuffer | None = None,
    ) -> None:
        self.parts = (loss, advantage, rewards, filters, mu, replay)


def parse(**parts):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Parts, "parts")
    config = {
        "loss": {"class_path": "spear_lightning.algorithm.PPOClip"},
        "advantage": {"class_path": "spear_lightning.algorithm.GRPO"},
        "mu": {"class_path": "spear_lightning.algorithm.Zero"},
    }
    parsed = parser.parse_object({"parts": config | parts})
    again = parser.parse_string(parser.dump(parsed))  # what is printed can be read back
    return parser.instantiate(again).parts.parts


def named(class_name, **init_args):
    return {"class_path": f"spear_lightning.algorithm.{class_name}", "init_args": init_args}


def test_everything_can_be_composed_from_a_configuration():
    loss, advantage, rewards, filters, mu, replay = parse(
        loss=named("ClipCov", ratio=0.1, lower=2, upper=60),
        advantage=named("GiGPO", mode="mean_std_norm"),
        rewards={"success": 1.0, "tool_variant": "flat_when_correct"},
        filters={"keep_share": 1.0, "overlong": False},
        mu=named("CosineDecay", horizon=20),
        replay=named(
            "ReplayBuffer", capacity=32, schedule=named("Drain", ready=1), recalibration=named("Decay", factor=0.9)
        ),
    )
    assert loss == algorithm.ClipCov(ratio=0.1, lower=2.0, upper=60.0)
    assert advantage == algorithm.GiGPO(mode="mean_std_norm")
    assert rewards == RewardComposer(success=1.0, tool_variant="flat_when_correct")
    assert filters == QualityFilters(keep_share=1.0, overlong=False)
    assert mu == algorithm.CosineDecay(20)
    assert (replay.capacity, replay.schedule, replay.recalibration) == (32, algorithm.Drain(1.0), algorithm.Decay(0.9))


@pytest.mark.parametrize("name", ["PPOClip", "ClipCov", "KLCov"])
def test_losses(name):
    assert parse(loss=named(name))[0] == getattr(algorithm, name)()


@pytest.mark.parametrize("name", ["GRPO", "GiGPO", "RLOO", "ReinforcePlusPlusBaseline"])
def test_estimators(name):
    assert parse(advantage=named(name))[1] == getattr(algorithm, name)()


@pytest.mark.parametrize("wrong", [named("GRPO"), named("PPOClip", clip_lo=0.2), named("PPOClip", clip_low="much")])
def test_wrong_classes_keys_and_types_are_refused(wrong):
    with pytest.raises(Exception, match=r"parts\.loss"):
        parse(loss=wrong)

"""Each ablation changes what it names, on any SPEAR recipe and on the quickstart, and nothing else."""

import sys
from pathlib import Path

import pytest
from comparison.plan import Arm, Comparison, compose, differences

from spear_lightning.algorithm import Drain, QualityFilters, ReplayBuffer
from spear_lightning.rollout.specs import TrainingRollouts
from spear_lightning.training.checks import check_replay
from tests.composing import CONFIGS, composed

ABLATIONS = CONFIGS / "ablation"
BASES = {
    "games": ("alfworld", "algorithm/spear-drbot-gigpo"),
    "math": ("math", "algorithm/spear-drbot-grpo-math"),
    "quickstart": ("quickstart",),
}

# By ablation, what it changes and to what; what `gone` settles in the test below is left out.
CURRICULUM = "trainer.callbacks.CurriculumSchedule"
CONSTANT = {"": "Constant", ".value": 1.0}
EXPECTED = {
    "no-curriculum": {
        f"{CURRICULUM}.{schedule}{key}": value
        for schedule in ("imitation", "tool_reward")
        for key, value in CONSTANT.items()
    },
    "imitation-only": {f"{CURRICULUM}.tool_reward": "Zero"},
    "intrinsic-only": {f"{CURRICULUM}.imitation": "Zero", "data.replay": None},
    "no-recalibration": {"data.replay.recalibration": "Decay", "data.replay.recalibration.factor": 1.0},
    "no-covariance-clipping": {"model.replay_loss": "PPOClip"},
    "no-replay-filter": {"data.replay.filter_outgrown": False},
    "no-overlong-filter": {"data.filters.overlong": False},
    "no-incomplete-filter": {"data.filters.incomplete": False},
    "no-repetitive-filter": {"data.filters.repetitive": False},
    "no-unreadable-filter": {"data.filters.unreadable": False},
    "all-groups": {"data.filters.keep_share": 1.0},
    "buffer-small": {"data.replay.capacity": 1024},
    "buffer-large": {"data.replay.capacity": 4096},
    "max-age-2": {"data.replay.max_age": 2},
    "max-age-10": {"data.replay.max_age": 10},
    "warmup-short": {f"{CURRICULUM}.imitation_warmup": 100},
    "warmup-long": {f"{CURRICULUM}.imitation_warmup": 400},
    "decay-short": {f"{CURRICULUM}.tool_reward_decay": 100},
    "decay-long": {f"{CURRICULUM}.tool_reward_decay": 400},
    "quickstart/buffer-small": {"data.replay.capacity": 128},
    "quickstart/buffer-large": {"data.replay.capacity": 512},
    "quickstart/warmup-short": {f"{CURRICULUM}.imitation_warmup": 0},
    "quickstart/warmup-long": {f"{CURRICULUM}.imitation_warmup": 20},
    "quickstart/decay-short": {f"{CURRICULUM}.tool_reward_decay": 10},
    "quickstart/decay-long": {f"{CURRICULUM}.tool_reward_decay": 40},
}
OF_CLIP_COV = {f"model.replay_loss.{key}" for key in ("ratio", "lower", "upper", "covariance")}
OF_PUBLISHED = {name for name in EXPECTED if f"quickstart/{name}" in EXPECTED}
CASES = [
    (base, name)
    for name in EXPECTED
    for base in BASES
    if (base == "quickstart" or not name.startswith("quickstart/"))
    and not (base == "quickstart" and name in OF_PUBLISHED)
]


@pytest.mark.parametrize(("base", "name"), CASES)
def test_it_changes_what_it_names_and_nothing_else(base, name):
    changed = composed(*BASES[base], f"ablation/{name}")
    found = differences({"before": composed(*BASES[base]), "after": changed})
    after = {key: values["after"] for key, values in found.items()}
    expected = dict(EXPECTED[name])
    gone = {key for key in found if found[key]["after"] is None and key not in expected}
    if base == "quickstart" and name in ("no-overlong-filter", "no-incomplete-filter"):
        expected = {}  # it has none of these
    if name == "no-covariance-clipping":
        assert gone == OF_CLIP_COV
    elif name == "no-recalibration":
        assert gone <= {"data.replay.recalibration.normalize_std"}
    elif name == "intrinsic-only":
        assert all(key.startswith("data.replay.") for key in gone)
    else:
        assert not gone
    assert {key: value for key, value in after.items() if key not in gone} == expected


@pytest.mark.parametrize("base", ["games", "math", "quickstart"])
@pytest.mark.parametrize("what", ["buffer", "warmup", "decay"])
def test_short_is_below_and_long_is_above_what_it_is_compared_with(base, what):
    low, high = ("small", "large") if what == "buffer" else ("short", "long")
    folder = "quickstart/" if base == "quickstart" else ""
    (_, less), (_, more) = (next(iter(EXPECTED[f"{folder}{what}-{size}"].items())) for size in (low, high))
    key = next(iter(EXPECTED[f"{what}-{low}"]))
    (value,) = {v for k, v in _flat(composed(*BASES[base])).items() if k == key}
    assert less < value < more


def _flat(config):
    return {key: values["a"] for key, values in differences({"a": config, "b": {}}).items()}


def test_every_file_is_in_the_table():
    assert {str(path.relative_to(ABLATIONS).with_suffix("")) for path in ABLATIONS.rglob("*.yaml")} == EXPECTED.keys()


def test_they_compose_with_each_other_and_with_a_model():
    config = composed(
        *BASES["games"],
        "ablation/imitation-only",
        "ablation/warmup-long",
        "ablation/no-recalibration",
        "ablation/max-age-2",
        "model/qwen2.5-7b",
    )
    flat = _flat(config)
    assert flat[f"{CURRICULUM}.tool_reward"] == "Zero"
    assert flat[f"{CURRICULUM}.imitation_warmup"] == 400
    assert (flat["data.replay.recalibration"], flat["data.replay.max_age"]) == ("Decay", 2)
    assert flat["model.policy.model"] == "Qwen/Qwen2.5-7B-Instruct"


def test_what_mathematics_refuses_is_what_the_header_says():
    filters, rollouts = QualityFilters(keep_share=0.75), TrainingRollouts(tasks=128, group_size=16)
    with pytest.raises(Exception, match=r"waits for 3072 .* at most 2880 can enter"):
        check_replay(ReplayBuffer(2048, 2, Drain(1.5)), filters, rollouts, 1)
    check_replay(ReplayBuffer(512, 2, Drain(1.5)), filters, rollouts, 1)
    with pytest.warns(match="more than 61% of these succeed"):
        check_replay(ReplayBuffer(4096, 7, Drain(1.5)), filters, rollouts, 1)
    with pytest.raises(Exception, match="It would never replay"):
        check_replay(ReplayBuffer(8192, 7, Drain(1.5)), filters, rollouts, 1)


@pytest.mark.parametrize("name", ["no-recalibration", "intrinsic-only"])
def test_the_comparison_takes_one_as_an_arm(name):
    arm = Arm.parse(f"{name}={ABLATIONS / name}.yaml")
    command = (sys.executable, "-m", "spear_lightning.cli.main")
    comparison = Comparison(CONFIGS / "quickstart.yaml", (arm,), (1,), (), ("1",), Path("unused"), command)
    config = compose(comparison, arm)
    assert {key: value for key, value in _flat(config).items() if key in EXPECTED[name]} == {
        key: value for key, value in EXPECTED[name].items() if value is not None
    }

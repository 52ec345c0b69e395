"""The comparison as a whole, with a stand-in for `spear`; the slow test runs the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import pytest
import yaml
from comparison.plan import differences

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = (sys.executable, str(Path(__file__).with_name("stand_in.py")))

BASE = {
    "gain": 5,
    "trainer": {
        "max_epochs": 4,
        "check_val_every_n_epoch": 2,
        "callbacks": [
            {"class_path": "spear_lightning.callbacks.LearningCurve"},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}},
        ],
    },
    "data": {"evaluation": {"temperature": 1.0}},
}
UNSAVED = [
    {"class_path": "LearningCurve"},
    {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "save_top_k": 0}},
]


@pytest.fixture(autouse=True)
def _fast(monkeypatch, request):
    monkeypatch.setattr("comparison.execution._POLL_SECONDS", 0.02)
    if "picture" not in request.node.name:
        monkeypatch.setattr(compare, "draw", lambda summary: b"")


class Study:
    """A comparison of the arms "plain" and "better" in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.write("base", BASE)
        self.write("plain", {})
        self.write("better", {"gain": 10})

    def write(self, name: str, values: dict) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(values))

    def arguments(self, *more: str, seeds: str = "1 2") -> list[str]:
        arms = [f"--arm={name}={self.folder / name}.yaml" for name in ("plain", "better")]
        return [
            f"--base={self.folder / 'base.yaml'}",
            *arms,
            f"--output={self.output}",
            "--seeds",
            *seeds.split(),
            *more,
        ]

    def run(self, *more: str, seeds: str = "1 2") -> int:
        return compare.main(self.arguments(*more, seeds=seeds), STAND_IN)

    def record(self, name: str) -> dict:
        return json.loads((self.output / f"{name}.json").read_text())

    def summary(self) -> dict:
        return json.loads((self.output / "summary.json").read_text())

    def attempts(self, name: str) -> list[int]:
        """The iteration that each attempt at training began with."""
        return [int(line) for line in (self.output / "runs" / name / "attempts").read_text().split()]


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_records_summary_and_picture(study):
    assert study.run("--jobs", "2") == 0
    record = study.record("better-seed2")
    assert record["status"] == "finished"
    assert record["validation"]["before"] == {
        "iteration": 0,
        "seconds": 0.0,
        "successes": 52,
        "episodes": 200,
        "success": 0.26,
    }
    assert [(point["iteration"], point["seconds"], point["successes"]) for point in record["curve"]] == [
        (0, 0.0, 52),
        (2, 4.0, 72),
        (4, 8.0, 92),
    ]
    assert {t: result["successes"] for t, result in record["test"].items()} == {"1": 92, "0.4": 112}
    assert record["seconds"] == {"generation": 4.0, "environment": 2.0, "other": 0.0, "update": 2.0, "training": 8.0}
    assert record["replay"]["episodes"] == 8
    assert record["replay"]["iterations"] == 2
    assert record["training"]["entropy"] == [1.0, 0.5, 0.333333, 0.25]

    summary = study.summary()
    test = summary["arms"]["better"]["measures"]["test, T = 1"]
    assert (test["n"], round(test["mean"], 6)) == (2, 0.4575)
    difference = summary["differences"]["better vs plain"]["test, T = 1"]
    assert {seed: round(value, 6) for seed, value in difference["by_seed"].items()} == {"1": 0.1, "2": 0.1}
    assert summary["differing_settings"] == {"gain": {"plain": 5, "better": 10}}
    assert "| better | 2 |" in (study.output / "summary.md").read_text()
    assert (study.output / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_skipped_and_changed_ones_are_not(study):
    assert study.run(seeds="1") == 0
    assert study.run() == 0
    assert study.attempts("plain-seed1") == [0]
    study.write("better", {"gain": 7})
    assert study.run() == 0
    assert study.attempts("plain-seed1") == [0]
    assert study.attempts("better-seed1") == [0]  # a fresh folder: the old one is of another configuration
    assert study.record("better-seed1")["validation"]["after"]["successes"] == 50 + 4 * 7 + 1


def test_other_test_temperatures_do_not_train_again(study):
    assert study.run(seeds="1") == 0
    assert study.run("--temperatures", "0", seeds="1") == 0
    assert study.attempts("plain-seed1") == [0]
    assert list(study.record("plain-seed1")["test"]) == ["0"]


def test_a_failed_run_is_recorded_stops_nothing_and_is_tried_again(study):
    study.write("better", {"gain": 10, "fail": True})
    assert study.run() == 1
    failed = study.record("better-seed1")
    assert failed["status"] == "failed"
    assert failed["log"] == ["the stand-in fails as told"]
    assert study.record("plain-seed2")["status"] == "finished"
    assert "better, seed 1" in (study.output / "summary.md").read_text()
    study.write("better", {"gain": 10})
    assert study.run() == 0
    assert study.record("better-seed1")["status"] == "finished"


def test_a_run_that_failed_once_goes_on_from_its_checkpoint(study):
    study.write("better", {"gain": 10, "fail_once_at": 3})
    assert study.run(seeds="1") == 1
    assert study.run(seeds="1") == 0
    assert study.attempts("better-seed1") == [0, 3]


def test_an_unusable_checkpoint_means_starting_anew(study, capsys):
    study.write("better", {"gain": 10, "fail_once_at": 3})
    assert study.run(seeds="1") == 1
    run = study.output / "runs" / "better-seed1"
    (run / "last.ckpt").write_text("damaged")
    (run / "attempts").write_text("0\n0\n")
    study.write("better", {"gain": 10, "fail_once_at": 3})
    assert study.run(seeds="1") == 1  # begins anew, and fails once more as a first attempt does
    assert "starting anew" in capsys.readouterr().out
    assert study.attempts("better-seed1") == [0]


def test_interrupted_by_a_signal_and_resumed(study):
    study.write("better", {"gain": 10, "hang_at": 3})
    script = f"import sys, compare; sys.exit(compare.main({study.arguments(seeds='1')!r}, {STAND_IN!r}))"
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths})
    checkpoint = study.output / "runs" / "better-seed1" / "last.ckpt"
    while not checkpoint.exists() or checkpoint.read_text() != "3":
        assert process.poll() is None
        time.sleep(0.05)
    # The folder is in use: a second comparison leaves it alone.
    assert study.run(seeds="1") == 1
    assert "another process" in study.record("better-seed1")["error"]
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert study.run(seeds="1") == 0
    assert study.attempts("better-seed1") == [0, 3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arm=new=missing.yaml"], "there is no file missing.yaml"),
        (["--arm=no-file"], "give NAME=OVERLAY.yaml"),
        (["--set", "trainer.max_epochs"], "give KEY=VALUE"),
        (["--set", "seed_everything=3"], "sets it itself"),
        (["--set", "trainer.max_epochs=5"], "multiple"),
        (["--set", "trainer.callbacks=[]"], "LearningCurve"),
        (["--set", f"trainer.callbacks={json.dumps(UNSAVED)}"], "save_top_k: 1"),
        (["--set", "trainer.logger=false"], "leave trainer.logger out"),
        (["--set", "refused=1"], "no such key: refused"),
        (["--baseline", "other"], "there is no arm 'other'"),
        (["--temperatures", "1", "1"], "given twice: 1"),
    ],
)
def test_bad_input_gets_one_message_before_anything_runs(study, capsys, more, message):
    assert study.run(*more) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare: error: ")
    assert message in error
    assert not study.output.exists()


def test_a_setting_does_not_switch_on_what_an_arm_has_switched_off(study, capsys):
    study.write("base", BASE | {"replay": {"size": 3}})
    study.write("plain", {"replay": None})
    assert study.run("--set", "replay.size=4") == 2
    assert "arm plain has replay: null" in capsys.readouterr().err
    study.write("plain", {"replay": {"age": 2}})
    assert study.run("--set", "replay.size=4", seeds="1") == 0


def test_another_start_is_another_configuration(study):
    start = study.folder / "policy"
    start.mkdir()
    (start / "model.safetensors").write_bytes(b"one")
    study.write("base", BASE | {"model": {"policy": {"model": str(start)}}})
    assert study.run(seeds="1") == 0
    first = study.record("plain-seed1")["digest"]
    (start / "model.safetensors").write_bytes(b"two")
    assert study.run(seeds="1") == 0
    assert study.record("plain-seed1")["digest"] != first


def test_an_arm_named_twice(study, capsys):
    assert study.run(f"--arm=plain={study.folder / 'plain.yaml'}") == 2
    assert "given twice: plain" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_thing_in_miniature(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    overlay = {
        "trainer": {"max_epochs": 2, "check_val_every_n_epoch": 1},
        "data": {
            "environment": {
                "init_args": {"train": 8, "validation": 6, "test": 6, "cache_dir": str(tmp_path / "cache")}
            },
            "rollouts": {"tasks": 2, "group_size": 4},
            "workers": 1,
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(overlay))
    output = tmp_path / "out"
    arm = f"--arm=spear-grpo=benchmarks/arms/spear-grpo.yaml,{tmp_path / 'small.yaml'}"
    arguments = ["--base=configs/quickstart.yaml", arm, "--seeds=1", "--temperatures=0.4", f"--output={output}"]
    assert compare.main(arguments) == 0
    record = json.loads((output / "spear-grpo-seed1.json").read_text())
    assert [point["iteration"] for point in record["curve"]] == [0, 1, 2]
    assert record["test"]["0.4"]["episodes"] == 6
    assert record["seconds"]["training"] > 0
    assert len(record["training"]["entropy"]) == 2
    assert list(json.loads((output / "summary.json").read_text())["arms"]) == ["spear-grpo"]


def test_callbacks_that_stand_in_the_list_twice():
    curriculum, monitor = "spear_lightning.callbacks.CurriculumSchedule", {"class_path": "a.Monitor"}
    first = {"imitation_warmup": 5, "imitation_max": 1.0, "tool_reward_decay": 20}
    second = {"imitation_warmup": 9, "imitation_max": None, "tool_reward": {"class_path": "b.Zero"}}

    def config(*entries):
        return {"trainer": {"callbacks": list(entries)}}

    one = {"class_path": curriculum, "init_args": first}
    found = differences(
        {
            "once": config(one, monitor),
            "twice": config(one, monitor, {"class_path": curriculum, "init_args": second}),
            "apart": config(one, monitor, {"class_path": "c.Monitor", "init_args": {"patience": 3}}),
        }
    )
    key = "trainer.callbacks.CurriculumSchedule"
    assert found == {
        f"{key}.imitation_warmup": {"once": 5, "twice": 9, "apart": 5},
        f"{key}.tool_reward": {"once": None, "twice": "Zero", "apart": None},
        "trainer.callbacks.Monitor 2": {"once": None, "twice": None, "apart": True},
        "trainer.callbacks.Monitor 2.patience": {"once": None, "twice": None, "apart": 3},
    }


def test_one_checkpoint_that_can_be_gone_on_from_is_enough(study):
    study.write(
        "base", BASE | {"trainer": BASE["trainer"] | {"callbacks": [*BASE["trainer"]["callbacks"], UNSAVED[1]]}}
    )
    assert study.run(seeds="1") == 0

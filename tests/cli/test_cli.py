"""What a user gets wrong ends with one message that names the key or the file, before any training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from spear_lightning.cli.fit import SpearCLI
from spear_lightning.cli.main import main
from tests.processes import start

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL = [
    "--data.rollouts.tasks=4",
    "--data.environment.train=8",
    "--data.environment.validation=2",
    "--data.environment.test=2",
    "--data.workers=1",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("games"))


def message_of(capsys, tmp_path, cache, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                "-c",
                QUICKSTART,
                f"--run.directory={tmp_path}",
                f"--data.environment.cache_dir={cache}",
                *SMALL,
                *arguments,
            ]
        )
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--data.rollouts.taskss=3"], ["taskss"]),
        (["--trainer.max_epochs=many"], ["max_epochs", "many"]),
        (["--model.policy.model=no/such/folder"], ["no/such/folder"]),
        (
            ["--data.rollouts.group_size=1", "--data.advantage.init_args.normalize_std=true"],
            ["group_size", "normalize_std"],
        ),
        (["--data.rollouts.top_p=0.9"], ["top_p", "importance ratio"]),
        (["--data.rollouts.temperature=0"], ["data.rollouts.temperature"]),
        (["--data.rollouts.tasks=9"], ["data.rollouts.tasks", "only 8"]),
        (
            ["--data.rollouts.resample=2"],
            [
                "data.rollouts.tasks is 4",
                "data.rollouts.resample 2",
                "may take 12 tasks",
                "only 8",
                "lower one of them",
            ],
        ),
        (["--data.rollouts.resample=-1"], ["spear: error: data.rollouts.resample must be at least 0, not -1"]),
        (
            ["--data.rollouts.resample=1", "--data.rollouts.max_staleness=1"],
            ["data.rollouts.resample is 1", "data.rollouts.max_staleness 1", "set max_staleness to 0"],
        ),
        (
            ["--data.rollouts.resample=1", "--data.rollouts.group_size=1"],
            ["data.rollouts.resample is 1", "data.rollouts.group_size 1", "raise group_size"],
        ),
        (["--model.optimizer.init_args.lr=0"], ["learning rate of 0"]),
        (["--data.replay=null"], ["CurriculumSchedule", "data.replay"]),
        (
            ["--data.replay.init_args.schedule=Drain", "--data.replay.init_args.capacity=2048"],
            ["waits for 3072 usable samples", "at most 105 can enter", "would never replay", "data.rollouts.tasks"],
        ),
        (["--data.replay.init_args.max_age=0"], ["spear: error: data.replay.max_age must be at least 1, not 0"]),
        (
            ["--data.baseline.percentile=120"],
            ["spear: error: data.baseline.percentile must be at least 0 and at most 100, not 120"],
        ),
        (
            ["--data.environment.games=official", "--data.environment.data_dir=no/data"],
            ["alfworld-download", "no/data"],
        ),
        (["--data.environment.task_types=[cook_dinner]"], ["cook_dinner", "pick_and_place_simple"]),
        (["--data.minibatches=0"], ["spear: error: data.minibatches must be at least 1, not 0"]),
        (
            ["--data.agent.max_action_characters=0"],
            ["spear: error: data.agent.max_action_characters must be at least 1, not 0"],
        ),
        (["--data.engine=VLLMEngine"], ["data.engine is VLLMEngine, but vLLM is not installed here: pip install"]),
        (
            [
                *("--data.engine=VLLMServerEngine", "--data.engine.init_args.addresses=['http://127.0.0.1:9']"),
                "--data.engine.init_args.restart_seconds=0",
            ],
            ["http://127.0.0.1:9 (data.engine.addresses) cannot be reached", "--worker-extension-cls"],
        ),
        (["--data.engine.init_args.cache_gib=1e6"], ["data.engine.cache_gib", "GiB are free", "lower it"]),
        (["--data.engine.init_args.cache_gib=0"], ["spear: error: data.engine.cache_gib must be above 0, not 0"]),
        (["--data.schedule=Lockstep", "--data.schedule.init_args.count=0"], ["data.schedule.count"]),
        (["--ckpt_path=no/such.ckpt"], ["no/such.ckpt"]),
    ],
)
def test_bad_input_ends_with_one_message(capsys, tmp_path, cache, arguments, names):
    message = message_of(capsys, tmp_path, cache, *arguments)
    for name in names:
        assert name in message


def test_a_corrupt_game_is_named(capsys, tmp_path):
    game = tmp_path / "json_2.1.1" / "train" / "pick_and_place_simple-Mug-None-Desk-301" / "trial_T1" / "game.tw-pddl"
    game.parent.mkdir(parents=True)
    game.write_text("{not json")
    (game.parent / "traj_data.json").write_text('{"task_type": "pick_and_place_simple"}')
    message = message_of(
        capsys, tmp_path, str(tmp_path), "--data.environment.games=official", f"--data.environment.data_dir={tmp_path}"
    )
    assert "game.tw-pddl" in message


@pytest.mark.parametrize(
    "overlays",
    [
        [],
        *[[path] for folder in ("algorithm", "engine") for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))],
    ],
)
@pytest.mark.parametrize("task", ["quickstart", "alfworld", "math"])
def test_configurations_compose_and_print_config_round_trips(capsys, tmp_path, task, overlays):
    def printed(*files):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *[part for file in files for part in ("-c", str(file))], "--print_config"])
        assert stop.value.code in (0, None)
        return capsys.readouterr().out

    once = printed(ROOT / "configs" / f"{task}.yaml", *overlays)
    (tmp_path / "printed.yaml").write_text(once)
    assert yaml.safe_load(printed(tmp_path / "printed.yaml")) == yaml.safe_load(once)


def test_small_configurations_compose(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(ROOT / "configs" / "small" / "math.yaml"), "--print_config"])
    assert stop.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["environment"]["init_args"]["tool"] == "code_interpreter"


def test_only_the_parser_that_is_asked_for_is_filled(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["spear", "fit", "-c", "run.yaml"])
    assert list(SpearCLI.subcommands()) == ["fit"]
    for asked in (["--help"], ["nonsense"], []):
        monkeypatch.setattr(sys, "argv", ["spear", *asked])
        assert list(SpearCLI.subcommands()) == ["fit", "validate", "test", "predict"]


def test_composing_a_configuration_does_not_import_the_game_engine():
    process = start(assert_not_imported, "textworld")  # forked from one that has composed the quickstart's
    process.join()
    assert process.exitcode == 0


def assert_not_imported(name: str) -> None:
    assert name not in sys.modules

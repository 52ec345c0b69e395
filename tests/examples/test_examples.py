"""The folders of examples/, each by the commands of its README, shortened."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.examples.running import ROOT, call, episodes, fit
from tests.processes import start_ranks

pytestmark = pytest.mark.slow

SMALL = {"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 10, "data.rollouts.tasks": 6}


def train(name: str, folder: Path, **changes: object) -> list[dict[str, float]]:
    """Run the command of an example's README with a smaller size."""
    text = (ROOT / "examples" / name / "README.md").read_text("utf-8")
    (found,) = re.findall(r"^PYTHONPATH=(\S+) .venv/bin/spear (fit .*)$", text, re.MULTILINE)
    return fit(ROOT / found[0], shlex.split(found[1]), {**SMALL, **changes}, folder)


@pytest.mark.parametrize("folder", sorted(path for path in (ROOT / "examples").iterdir() if path.is_dir()))
def test_a_folder_has_a_readme_a_configuration_and_one_python_file(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    assert {"README.md", "config.yaml"} < set(names)
    assert len(names) == 3
    (module,) = (name for name in names if name.endswith(".py"))
    assert module.removesuffix(".py") not in sys.stdlib_module_names
    command = f"PYTHONPATH=examples/{folder.name} .venv/bin/spear fit -c examples/{folder.name}/config.yaml"
    assert command in (folder / "README.md").read_text("utf-8")
    assert f"({folder.name}/README.md)" in (ROOT / "examples" / "README.md").read_text("utf-8")


def test_own_environment(tmp_path: Path) -> None:
    metrics = train("own_environment", tmp_path / "run", **{"data.environment.env_args": {"places": 3, "moves": 5}})
    assert len(metrics) == 2
    assert all(row["rollout/aborted"] == 0 and row["rollout/turns"] <= 5 for row in metrics)
    assert max(row["update/grad_norm"] for row in metrics) > 0
    played = episodes(tmp_path / "run")  # of every tenth iteration
    assert len(played) == 48
    assert {episode["success"] for episode in played} == {True, False}
    assert metrics[0]["rollout/success"] == pytest.approx(sum(episode["success"] for episode in played) / 48)
    for episode in played:
        assert episode["turns"][0]["observation"].count(", a ") == 2  # three places, as configured
        picked = episode["turns"][-1]["action"].startswith("take ") and episode["turns"][-1]["valid"]
        assert picked == (episode["status"] == "finished")
        assert picked or not episode["success"]


def test_own_tool_agent(tmp_path: Path) -> None:
    text = (ROOT / "examples/own_tool_agent/README.md").read_text("utf-8")
    assert re.search(r"^.venv/bin/python examples/own_tool_agent/stock.py ", text, re.MULTILINE)
    start = tmp_path / "start"
    made = start_ranks(1, call, str(ROOT / "examples/own_tool_agent"), make_start, str(start), folder=tmp_path / "made")
    assert made.join() == [0], made.printed()
    size = {"trainer.max_epochs": 8, "data.rollouts.tasks": 12, "model.policy.model": str(start)}
    metrics = train("own_tool_agent", tmp_path / "run", **size)
    first, last = metrics[0], metrics[-1]
    assert 0 < first["rollout/tool_calls"] < 0.5
    assert first["rollout/success"] < 0.4
    assert last["rollout/tool_calls"] > first["rollout/tool_calls"] + 0.2
    assert last["rollout/success"] > first["rollout/success"] + 0.2
    played = [episode for episode in episodes(tmp_path / "run") if len(episode["turns"]) == 2]
    looked = [episode for episode in played if episode["turns"][0]["tool_call"] and episode["turns"][0]["valid"]]
    assert looked
    for episode in looked:
        assert episode["turns"][1]["observation"].startswith('[{"role": "tool", "name": "stock"')
    assert sum(episode["success"] for episode in looked) > len(looked) / 2


def make_start(folder: str) -> None:
    import stock  # found as the README has it: in its own folder

    stock.make_policy(folder, demonstrations=2000)


def test_own_loss(tmp_path: Path) -> None:
    games = {f"data.environment.{split}": 8 for split in ("train", "validation", "test")}
    changes = {**games, "data.environment.cache_dir": str(tmp_path / "games"), "data.minibatches": 2}
    bounds = {"model.loss.bound": 1e-4, "model.replay_loss.bound": 1e6}
    first, second = train("own_loss", tmp_path / "run", **changes, **bounds)
    assert first["update/clip_fraction"] == second["update/clip_fraction"] == 1  # which would leave PPO no gradient
    assert first["update/grad_norm"] > 0
    assert second["replay/used"] > 0
    assert second["replay/clip_fraction"] == 0

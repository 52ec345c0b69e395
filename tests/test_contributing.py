"""What CONTRIBUTING.md says is so: its files and names are there, its examples are run as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import spear_lightning.cli.fit  # noqa: F401 - what can be named in YAML without its module
from spear_lightning.agents.base import Agent
from spear_lightning.algorithm import PolicyLoss, aggregate
from spear_lightning.engines.base import Sampling
from spear_lightning.environments.base import TaskSuite
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Rollout
from spear_lightning.rollout.specs import EpisodeSpec
from tests.agents.players import ScriptedEngine, byte_tokenizer
from tests.data.made import make_episode

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_files_it_names_are_there_and_define_what_it_says() -> None:
    paths = set(re.findall(r"`((?:spear_lightning|callbacks|tests)/[\w/]+\.py)`", TEXT))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    for subject, path in re.findall(r"a subclass of `(\w+)` in `([\w/]+\.py)`", TEXT):
        assert f"class {subject}(" in (ROOT / path).read_text(encoding="utf-8")
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", TEXT):
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(class|def) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_name_are_there(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|yaml|md))`", text))
    places = (ROOT, ROOT / "spear_lightning", ROOT / "spear_lightning/sandbox", ROOT / "configs")
    assert [path for path in sorted(named) if not any((place / path).exists() for place in places)] == []
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s:]+)\)", text)):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What the headings of a Markdown page can be linked as."""
    lines = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL).splitlines()
    headings = (line.lstrip("#").strip().lower() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_every_package_is_in_its_table() -> None:
    table = TEXT[TEXT.index("| package |") : TEXT.index("| question |")]
    named = {
        name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == {path.parent.name for path in (ROOT / "spear_lightning").glob("*/__init__.py")}


def example(subject: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration of a worked example, whose module can be imported, here and in worker processes."""
    (section,) = re.findall(rf"^## An? {subject} of your own$(.*?)^## ", TEXT, re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (folder / f"my_{subject}.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def made(base: type, config: Any) -> Any:
    """The object that a configuration says, made as the command line makes it."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, "it")
    return parser.instantiate(parser.parse_object({"it": config})).it


def test_its_loss_is_composed_by_class_path_and_reinforces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = made(PolicyLoss, example("loss", tmp_path, monkeypatch)["model"]["loss"])
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    logp = logits.log_softmax(-1)[..., 0]
    mask = torch.tensor([[1.0, 0.0]])
    told = loss(logp, logp.detach(), torch.tensor([[1.0, 5.0]]), mask, entropies=torch.ones(1, 2))
    aggregate(told.loss, mask, "token-mean").backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], 2 * torch.tensor([-2 / 3, 1 / 3, 1 / 3]))
    assert (logits.grad[0, 1] == 0).all()


def test_its_agent_plays_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = made(TaskSuite, example("environment", tmp_path, monkeypatch)["data"]["environment"])
    agent = made(Agent, example("agent", tmp_path, monkeypatch)["data"]["agent"])
    tokenizer = byte_tokenizer()
    agent.bind(tokenizer)
    tasks = suite.tasks("train")
    assert len(tasks) == 100

    def bisect(prompt: str, number: float) -> str:
        low, high = 1, 5
        said = re.findall(r"^(\d)\S*\n(larger|smaller)", prompt, re.MULTILINE)
        for guess, word in said:
            low, high = (int(guess) + 1, high) if word == "larger" else (low, int(guess) - 1)
        return f"Let me see.\n{(low + high) // 2}" if len(said) != 1 else " "

    with EnvironmentPool(suite, workers=1) as pool:
        engine = ScriptedEngine(tokenizer, bisect)
        specs = [EpisodeSpec(task, number, 0) for number, task in enumerate(tasks[:20])]
        rollout = Collector(pool, agent, engine).play(specs, Sampling(64), iteration=0, seed=1, max_turns=5)
    assert {episode.success for episode in rollout.episodes} == {True, False}
    for episode in rollout.episodes:
        assert [turn.valid for turn in episode.turns] == [turn.action is not None for turn in episode.turns]
        assert all(turn.action in (None, *"12345") for turn in episode.turns)
        assert episode.turns[0].action == "3"


def test_its_callback_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = example("callback", tmp_path, monkeypatch)["trainer"]["callbacks"]
    callback, trainer = made(Callback, config), SimpleNamespace(should_stop=False)
    for wins in (1, 2):
        episodes = [make_episode(0, index, success=index < wins) for index in range(4)]
        for split in ("validation", "train"):
            assert not trainer.should_stop
            callback.on_rollout_end(trainer, None, Rollout(split, 0, episodes, [], {}))
    assert trainer.should_stop


def test_an_iteration_is_read_in_seven_short_files() -> None:
    table = TEXT[TEXT.index("in seven files") : TEXT.index("A response passes")]
    paths = re.findall(r"^\| `([\w/]+\.py)`", table, re.MULTILINE)
    assert len(paths) == 7
    assert sum(len((ROOT / path).read_text("utf-8").splitlines()) for path in paths) < 2500

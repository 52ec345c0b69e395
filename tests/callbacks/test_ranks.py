"""Two processes that each play half of the episodes report what one process reports that plays all of them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from spear_lightning.callbacks import EntropyMonitor, LearningCurve, RolloutLog, RolloutProgress, ThroughputMonitor
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_episode, make_trainer, make_turn

# Ranks differ in everything: number of episodes, of tokens, of turns, task types.
TRAIN = [
    make_episode([make_turn([1.0, 3.0])], index=0, success=True, kind="pick"),
    make_episode([make_turn([0.1]), make_turn([0.2] * 5), make_turn([7.0])], index=1, kind="heat", reward=3.0),
    make_episode([make_turn([2.0] * 9, text="the worst")], index=2, reward=-1.0, kind="pick"),
]
HELD_OUT = [
    make_episode([make_turn([0.5])], group=g, success=g < 2, kind="cool" if g == 1 else "pick") for g in range(5)
]
SCRIPT = Script(rollouts={("train", 0): TRAIN, ("validation", 0): HELD_OUT}, parts=2)


def timed(name: str) -> bool:
    return name.startswith("time/") or "per_second" in name


def play(folder: Path, ranks: int) -> dict[str, Any]:
    folder.mkdir()
    monitor = EntropyMonitor(lower=50.0, upper=None, patience=1, action="stop")
    trainer = make_trainer(
        folder,
        [monitor, LearningCurve(table=False), RolloutLog(), RolloutProgress(), ThroughputMonitor()],
        devices=ranks,
        strategy="ddp_spawn" if ranks > 1 else "auto",
        max_epochs=5,
        limit_val_batches=1.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(TinyModule(), datamodule=TinyData(SCRIPT))
    lines = [line for path in sorted(folder.rglob("train/*.jsonl")) for line in path.read_text().splitlines()]
    return {
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items() if not timed(name)},
        "timed": sorted(filter(timed, trainer.callback_metrics)),
        "rate": trainer.callback_metrics["rollout/episodes_per_second"].item(),
        "curve": json.loads((folder / "evaluations.json").read_text()),
        "transcripts": (folder / "rollouts" / "train" / "iteration-00000.md").read_text(),
        "episodes": sorted(json.loads(line)["index"] for line in lines),
        "files": len(list(folder.rglob("train/*.jsonl"))),
        "iterations": len(list(folder.rglob("train/*.md"))),
    }


@pytest.mark.slow
def test_two_ranks_report_what_one_reports(tmp_path: Path) -> None:
    one, two = play(tmp_path / "one", 1), play(tmp_path / "two", 2)
    assert (one.pop("files"), two.pop("files")) == (1, 2)
    assert one["iterations"] == 1, "stopped after the first iteration, on every rank"
    # Each phase of a made-up rollout takes 0.3 s on each rank: the episodes of all in the time of one.
    assert one.pop("rate") == two.pop("rate") == pytest.approx(3 / 0.3)
    assert two.pop("metrics") == pytest.approx(one.pop("metrics"))
    assert two == one
    assert one["curve"]["evaluations"][0]["successes"] == 2
    assert one["curve"]["evaluations"][0]["episodes"] == 5

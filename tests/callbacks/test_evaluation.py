"""EvaluationReport in real trainers: what is printed and written, by one rank and by two."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from spear_lightning.callbacks import EvaluationReport
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_episode, make_trainer, make_turn
from tests.processes import start_ranks


def episodes() -> list[object]:
    """Three tasks, two attempts at each."""
    return [
        make_episode(
            [make_turn([0.5] * 3, valid=attempt == 0)] * (game + 1),
            group=game,
            index=attempt,
            success=game == 0 or (game == 1 and attempt == 0),
            kind="pick" if game < 2 else "heat",
        )
        for game in range(3)
        for attempt in range(2)
    ]


def evaluate(folder: Path, ranks: int = 1) -> None:
    script = Script(rollouts={("validation", 0): episodes(), ("test", 1): episodes()}, parts=2)
    trainer = make_trainer(
        folder,
        [EvaluationReport()],
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        limit_val_batches=1.0,
    )
    module, data = TinyModule(), TinyData(script)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(module, datamodule=data, verbose=False)
        trainer.test(module, datamodule=data, verbose=False)


def test_the_table_and_the_file_say_the_same(tmp_path, capsys):
    evaluate(tmp_path)
    found = json.loads((tmp_path / "validation.json").read_text())
    assert (found["tasks"], found["episodes"], found["attempts"], found["aborted"]) == (3, 6, 2, 0)
    assert found["success"]["mean"] == pytest.approx(0.5)
    assert {k: v["mean"] for k, v in found["pass_at"].items()} == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert found["by_task_type"]["pick"]["success"]["mean"] == pytest.approx(0.75)
    assert found["turns"] == 2
    assert found["tokens"] == 6
    assert found["invalid"] == 0.5
    assert json.loads((tmp_path / "test.json").read_text())["success"] == found["success"]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("│ all"))
    assert "50.0% [" in row
    assert "66.7% [" in row
    assert "avg@2" in printed


def test_two_ranks_report_what_one_reports(tmp_path):
    evaluate(tmp_path / "one")
    ranks = start_ranks(2, evaluate, tmp_path / "two", 2, folder=tmp_path / "printed")
    assert ranks.join(60) == [0, 0], ranks.printed()
    for name in ("validation.json", "test.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert ranks.printed("out").count("avg@2") == 2, "one table each, of the first rank"


def test_a_training_run_is_not_reported(tmp_path, capsys):
    trainer = make_trainer(tmp_path, [EvaluationReport()], limit_val_batches=1.0)
    trainer.fit(TinyModule(), datamodule=TinyData())
    assert not (tmp_path / "validation.json").exists()
    with pytest.raises(ValueError, match=r"EvaluationReport\.confidence must be above 0 and below 1"):
        EvaluationReport(confidence=1.0)

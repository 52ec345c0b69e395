import json
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from spear_lightning.callbacks import LearningCurve
from spear_lightning.callbacks.plot import draw_curve
from spear_lightning.metrics.intervals import newcombe, wilson
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_episode, make_trainer, make_turn

SCRIPT = Script(entropies=[1.0, 0.5, 0.25], successes=[1, 2, 3], held_out=[2, 4, 5, 6], games=8)
PNG = b"\x89PNG\r\n\x1a\n"


def fit(folder: Path, curve: LearningCurve, script: Script = SCRIPT, **arguments: Any) -> Any:
    checkpoint: str | None = arguments.pop("ckpt_path", None)
    defaults: dict[str, Any] = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "max_epochs": 3}
    trainer = make_trainer(folder, [curve], **{**defaults, **arguments})
    trainer.fit(TinyModule(), datamodule=TinyData(script), ckpt_path=checkpoint, weights_only=False)
    return trainer


def test_the_curve_begins_before_training_and_has_every_validation(tmp_path: Path) -> None:
    curve = LearningCurve(tmp_path / "out")
    fit(tmp_path, curve)
    assert [(e.iteration, e.successes, e.episodes, e.updates) for e in curve.evaluations] == [
        (0, 2, 8, 0),
        (1, 4, 8, 2),
        (2, 5, 8, 4),
        (3, 6, 8, 6),
    ]
    assert [(p.iteration, p.success, p.entropy) for p in curve.training] == [
        (0, 0.25, 1.0),
        (1, 0.5, 0.5),
        (2, 0.75, 0.25),
    ]
    report = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    last = report["evaluations"][-1]
    assert last["interval"] == pytest.approx(wilson(6, 8))
    # games 0, 2, 4, 6 are of type heat, and 0 to 5 are won
    assert last["by_task_type"]["heat"] == {
        "episodes": 4,
        "successes": 3,
        "success": 0.75,
        "interval": pytest.approx(list(wilson(3, 4))),
    }
    assert len(report["training"]) == 3
    assert (tmp_path / "out" / "learning_curve.png").read_bytes().startswith(PNG)


def test_the_table_compares_before_with_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, LearningCurve())
    table = capsys.readouterr().out
    low, high = newcombe((2, 8), (6, 8))
    row = next(line for line in table.splitlines() if " all " in line)
    assert "before training" in table
    assert "after 3 iterations" in table
    assert "25.0% [7.1%, 59.1%]" in row
    assert "75.0% [40.9%, 92.9%]" in row
    assert f"+50.0 [{100 * low:+.1f}, {100 * high:+.1f}]" in row
    assert [line.split()[1] for line in table.splitlines() if line.startswith("│")] == ["heat", "pick", "all"]


def test_validation_before_fit_is_the_first_point(tmp_path: Path) -> None:
    curve, module, data = LearningCurve(), TinyModule(), TinyData(SCRIPT)
    trainer = make_trainer(tmp_path, [curve], limit_val_batches=1.0, max_epochs=1)
    trainer.validate(module, datamodule=data, verbose=False)
    assert not (tmp_path / "evaluations.json").exists(), "a validation on its own leaves a run's files alone"
    trainer.fit(module, datamodule=data)
    assert [(e.iteration, e.successes) for e in curve.evaluations] == [(0, 2), (1, 4)]
    assert len(json.loads((tmp_path / "evaluations.json").read_text())["evaluations"]) == 2


def test_a_test_adds_no_point(tmp_path: Path) -> None:
    curve = LearningCurve()
    trainer = make_trainer(tmp_path, [curve])
    trainer.test(TinyModule(), datamodule=TinyData(SCRIPT), verbose=False)
    trainer.predict(TinyModule(), datamodule=TinyData(SCRIPT))
    assert curve.evaluations == []
    assert curve._results.records == []


@pytest.mark.slow
def test_resuming_gives_the_curve_of_an_uninterrupted_run(tmp_path: Path) -> None:
    fit(tmp_path, LearningCurve(tmp_path / "whole"), max_epochs=4)
    # saved by the validation, before the epoch has ended: the worst moment
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_on_train_epoch_end=False, save_top_k=-1)
    trainer = make_trainer(
        tmp_path,
        [LearningCurve(tmp_path / "part"), saver],
        limit_val_batches=1.0,
        num_sanity_val_steps=-1,
        enable_checkpointing=True,
    )
    trainer.fit(TinyModule(), datamodule=TinyData(SCRIPT))
    later = Script(entropies=SCRIPT.entropies, successes=SCRIPT.successes, held_out=[6], games=8)
    curve = LearningCurve(tmp_path / "part")
    fit(tmp_path, curve, later, max_epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    whole, part = (json.loads((tmp_path / name / "evaluations.json").read_text()) for name in ("whole", "part"))
    assert [e["iteration"] for e in part["evaluations"]] == [0, 1, 2, 3, 4]
    assert part == whole


def test_parts_are_added_up_and_forgotten_after_an_interrupted_evaluation(tmp_path: Path) -> None:
    class Interrupted(TinyModule):
        def validation_step(self, batch: float, batch_idx: int) -> None:
            raise RuntimeError("interrupted")

    curve = LearningCurve()
    trainer = make_trainer(tmp_path, [curve], limit_val_batches=1.0)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.validate(Interrupted(), datamodule=TinyData(SCRIPT), verbose=False)
    trainer.validate(TinyModule(), datamodule=TinyData(SCRIPT), verbose=False)
    assert [e.episodes for e in curve.evaluations] == [8]


def test_unknown_entropy_and_no_validation_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = LearningCurve()
    fit(tmp_path, curve, Script(entropies=[float("nan")]), limit_val_batches=0)
    assert [p.entropy for p in curve.training] == [None] * 3
    assert not (tmp_path / "evaluations.json").exists()
    assert capsys.readouterr().out == ""


def test_one_task_type_needs_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = [make_episode([make_turn([1.0])], success=True, kind="")]
    script = Script(rollouts={("validation", number): episodes for number in range(4)}, parts=1)
    fit(tmp_path, LearningCurve(), script)
    table = capsys.readouterr().out
    assert [line.split()[1] for line in table.splitlines() if line.startswith("│")] == ["all"]


def test_the_table_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, LearningCurve(table=False))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "learning_curve.png").exists()


@pytest.mark.parametrize("points", [1, 2])
@pytest.mark.parametrize("training", [[], [(0, 0.5, None)], [(0, 0.5, 1.0), (1, 0.6, None)]])
def test_any_amount_of_points_can_be_drawn(points: int, training: list[tuple[int, float, float | None]]) -> None:
    evaluations = [(number, 0.5, 0.25, 0.75) for number in range(points)]
    assert draw_curve(evaluations, training, 8, 0.95).startswith(PNG)


def test_arguments_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LearningCurve\.confidence must be above 0 and below 1, not 95"):
        LearningCurve(confidence=95)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MisconfigurationException, match=r"cannot write to .* set LearningCurve.directory"):
        fit(tmp_path, LearningCurve(tmp_path / "file" / "out"))

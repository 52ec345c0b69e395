import io
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from spear_lightning.callbacks import RolloutProgress
from spear_lightning.callbacks import progress as module
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_trainer

SCRIPT = Script(entropies=[1.0, 0.5], successes=[1, 3], held_out=[2, 6], games=8)


def test_one_line_per_iteration_and_evaluation_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, [RolloutProgress()], limit_val_batches=1.0, num_sanity_val_steps=-1)
    trainer.fit(TinyModule(), datamodule=TinyData(SCRIPT))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    seconds = r"\d+\.\d s"
    figures = [
        r"validation after 0 iterations: success 0\.250 \[0\.071, 0\.591\] \(2/8 episodes\)  " + seconds,
        r"validation after 1 iterations: success 0\.750 \[0\.409, 0\.929\] \(6/8 episodes\)  " + seconds,
        r"iteration 1/2  success 0\.250  reward \+0\.250  entropy 1\.000  "
        + seconds
        + r" \(generation 0\.1, environment 0\.2.*\)",
        r"validation after 2 iterations: success 0\.750 \[0\.409, 0\.929\] \(6/8 episodes\)  " + seconds,
        r"iteration 2/2  success 0\.750  reward \+0\.750  entropy 0\.500  "
        + seconds
        + r" \(generation 0\.1, environment 0\.2.*\)",
    ]
    assert len(lines) == len(figures), lines
    for line, pattern in zip(lines, figures, strict=True):
        assert re.fullmatch(pattern, line), line


def test_validate_test_and_predict_tell_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, [RolloutProgress()], limit_val_batches=1.0)
    trainer.validate(TinyModule(), datamodule=TinyData(SCRIPT), verbose=False)
    trainer.test(TinyModule(), datamodule=TinyData(SCRIPT), verbose=False)
    trainer.predict(TinyModule(), datamodule=TinyData(SCRIPT))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(" after")[0] for line in lines] == ["validation", "test", "predict"]
    assert all("2/8 episodes" in line for line in lines)


def test_an_unlimited_run_has_no_last_iteration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, [RolloutProgress()], max_epochs=-1, max_steps=2)
    trainer.fit(TinyModule(), datamodule=TinyData(SCRIPT))
    assert capsys.readouterr().out.startswith("iteration 1/?  ")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda: Console(file=screen, force_terminal=True, width=120, _environ={}))
    return screen


def test_a_terminal_shows_three_bars_and_no_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = on_a_terminal(monkeypatch)
    bar = RolloutProgress(refresh_rate=1e9)
    trainer = make_trainer(tmp_path, [bar], limit_val_batches=1.0)
    trainer.fit(TinyModule(), datamodule=TinyData(SCRIPT))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    last = [next(line for line in reversed(text.splitlines()) if line.startswith(name)) for name in ("run", "updates")]
    assert "2/2" in last[0]
    assert "success 0.750  reward +0.750  entropy 0.500" in last[0]
    assert "2/2" in last[1]
    assert any(line.startswith("rollout") and "4/4" in line for line in text.splitlines())
    assert "validation after 2 iterations: success 0.750 [0.409, 0.929]" in text
    assert "iteration 1/2" not in text
    assert capsys.readouterr().out == ""
    assert bar._progress is None, "the terminal is given back"


def test_the_terminal_is_given_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(TinyModule):
        def training_step(self, batch: float, batch_idx: int) -> None:
            raise RuntimeError("out of memory")

    screen = on_a_terminal(monkeypatch)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, [RolloutProgress()]).fit(Fails(), datamodule=TinyData(SCRIPT))
    assert screen.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize("plain", [True, False])
def test_what_is_shown_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        module, "Console", lambda: Console(file=screen, force_terminal=plain, force_interactive=True, _environ={})
    )
    make_trainer(tmp_path, [RolloutProgress(plain=plain)]).fit(TinyModule(), datamodule=TinyData(SCRIPT))
    assert ("iteration 1/2" in capsys.readouterr().out) == plain
    assert ("updates" in screen.getvalue()) != plain


def test_a_rank_that_is_not_the_first_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = RolloutProgress()
    trainer = make_trainer(tmp_path, [bar])
    bar.disable()
    trainer.fit(TinyModule(), datamodule=TinyData(SCRIPT))
    assert capsys.readouterr().out == ""


def test_it_is_the_only_bar(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [RolloutProgress()])
    assert [type(c) for c in trainer.callbacks if isinstance(c, ProgressBar)] == [RolloutProgress]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_the_refresh_rate_must_be_positive(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"RolloutProgress\.refresh_rate must be above 0"):
        RolloutProgress(refresh_rate=rate)

"""ShardedCheckpoint in real trainers: what is kept, what a kill leaves, what a failed write costs."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from spear_lightning.callbacks import ShardedCheckpoint
from spear_lightning.callbacks.checkpoint import resolve_checkpoint
from spear_lightning.checkpoint.manifest import Manifest, complete_checkpoints, problem
from spear_lightning.training.module import SpearModule
from tests.callbacks.tiny import TinyData, TinyModule, make_trainer
from tests.processes import start


class Scored(TinyModule):
    """Logs a validation result that rises and falls; carries a tensor large enough that writing it takes time."""

    def __init__(self, scores: tuple[float, ...] = (0.1, 0.5, 0.3, 0.2), ballast: int = 1) -> None:
        super().__init__()
        self.scores = scores
        self.register_buffer("ballast", torch.zeros(ballast))

    def on_validation_epoch_end(self) -> None:
        self.log("validation/success", self.scores[self.current_epoch % len(self.scores)])

    def on_train_epoch_start(self) -> None:
        self.ballast.fill_(float(self.current_epoch + 1))


class Slowly(Callback):
    def on_train_batch_end(self, *args: object) -> None:
        time.sleep(0.02)


def fit(folder: Path, callback: ShardedCheckpoint, module: TinyModule | None = None, **options: object) -> Scored:
    module = module or Scored()
    ckpt_path, callbacks = options.pop("ckpt_path", None), options.pop("callbacks", [])
    trainer = make_trainer(
        folder,
        [*callbacks, callback],
        **{"limit_val_batches": 1.0, "max_epochs": 4, "enable_checkpointing": True, **options},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = None if ckpt_path is None else resolve_checkpoint(str(ckpt_path), trainer)
        trainer.fit(module, datamodule=TinyData(), ckpt_path=path)
    return module


def kept(folder: Path) -> list[int]:
    return sorted(Manifest.load(path).iteration for path in complete_checkpoints(folder / "checkpoints"))


def test_the_newest_and_the_best_are_kept(tmp_path):
    fit(tmp_path, ShardedCheckpoint(keep=1))
    assert kept(tmp_path) == [2, 4]
    manifest = Manifest.load(tmp_path / "checkpoints/iteration-00002")
    assert manifest.score == 0.5
    assert (manifest.world_size, manifest.stage, manifest.strategy) == (1, None, "SingleDeviceStrategy")
    assert (tmp_path / "checkpoints/latest").read_text().strip() == "iteration-00004"
    best = resolve_checkpoint("best", make_trainer(tmp_path, [ShardedCheckpoint()], enable_checkpointing=True))
    assert best == str(tmp_path / "checkpoints/iteration-00002/state")


@pytest.mark.parametrize(
    ("settings", "iterations"),
    [
        ({"every_n_iterations": 3, "keep": 9, "monitor": None}, [3, 4]),
        ({"every_n_iterations": 3, "keep": 9}, [1, 2, 3, 4]),  # 1 and 2 were the best so far
        ({"every_n_iterations": 9, "keep": 9, "mode": "min"}, [1, 4]),
    ],
)
def test_when_it_is_saved(tmp_path, settings, iterations):
    fit(tmp_path, ShardedCheckpoint(**settings))
    assert kept(tmp_path) == iterations


def test_training_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    whole = fit(tmp_path / "whole", ShardedCheckpoint(keep=9))
    fit(tmp_path / "cut", ShardedCheckpoint(keep=9), max_epochs=3)
    damaged = tmp_path / "cut/checkpoints/iteration-00003/state"
    damaged.write_bytes(damaged.read_bytes()[:100])
    resumed = fit(tmp_path / "cut", ShardedCheckpoint(keep=9), ckpt_path="last")
    assert torch.equal(resumed.weight, whole.weight)
    assert kept(tmp_path / "cut") == [1, 2, 3, 4]
    assert problem(tmp_path / "cut/checkpoints/iteration-00003") is not None, "kept as it is, beside its successor"


def test_a_run_started_afresh_in_the_folder_of_another_has_a_best_of_its_own(tmp_path):
    fit(tmp_path, ShardedCheckpoint(keep=1), Scored((0.1, 0.9)))  # 4 is the best and the newest
    fit(tmp_path, ShardedCheckpoint(keep=1), Scored((0.1, 0.5, 0.3, 0.2)))
    assert kept(tmp_path) == [2, 4, 4], "of the older run nothing is removed"
    trainer = make_trainer(tmp_path, [ShardedCheckpoint()], enable_checkpointing=True)
    assert resolve_checkpoint("best", trainer) == str(tmp_path / "checkpoints/iteration-00002/state")
    fit(tmp_path, ShardedCheckpoint(keep=1), Scored((0.1, 0.2, 0.3, 0.4, 0.6)), max_epochs=5, ckpt_path="last")
    assert kept(tmp_path) == [4, 5], "the run that went on has 5 as its newest and its best"


def test_last_before_the_first_checkpoint_starts_from_the_beginning(tmp_path):
    assert torch.equal(
        fit(tmp_path / "a", ShardedCheckpoint(), ckpt_path="last").weight,
        fit(tmp_path / "b", ShardedCheckpoint()).weight,
    )


def test_checkpoints_that_cannot_be_used_are_named(tmp_path, tiny_policy):
    fit(tmp_path, ShardedCheckpoint(monitor=None))
    folder = tmp_path / "checkpoints/iteration-00004"
    trainer = make_trainer(tmp_path)
    assert resolve_checkpoint(tmp_path / "other.ckpt", trainer) == str(tmp_path / "other.ckpt")
    manifest = Manifest.load(folder)
    Manifest(**{**vars(manifest), "stage": 2, "world_size": 3}).save(folder)
    with pytest.raises(MisconfigurationException, match=r"iteration-00004 was written by 3 ranks.*trainer\.devices"):
        resolve_checkpoint(folder, trainer)
    with pytest.raises(MisconfigurationException, match=r"spear reshard .*iteration-00004"):
        resolve_checkpoint(folder, trainer)
    module = SpearModule(tiny_policy())
    found = {**module.policy.fingerprint(), "tokenizer": "another"}
    Manifest(**{**vars(manifest), "policy": found}).save(folder)
    with pytest.raises(MisconfigurationException, match=r"another model: tokenizer is another, here .*model\.policy"):
        resolve_checkpoint(folder, trainer, module)
    (folder / "state").unlink()
    with pytest.raises(
        MisconfigurationException, match=r"iteration-00004 is not a complete checkpoint.*state is missing"
    ):
        resolve_checkpoint(folder, trainer)


def _limited(folder: Path, on_error: str, megabytes: float) -> None:
    class Limit(Callback):
        def on_train_epoch_start(self, trainer: object, pl_module: object) -> None:
            if trainer.current_epoch == 2:  # type: ignore[attr-defined]
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 2**20), resource.RLIM_INFINITY))

    module = Scored(ballast=2**19)
    try:
        fit(folder, ShardedCheckpoint(keep=9, on_error=on_error), module, callbacks=[Limit()])
    except OSError as error:
        (folder / "error.txt").write_text(str(error))
    (folder / "epochs.txt").write_text(str(int(module.ballast[0])))


@pytest.mark.parametrize(("on_error", "epochs"), [("raise", "3"), ("continue", "4")])
def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, on_error, epochs):
    process = start(_limited, tmp_path, on_error, 1)
    process.join(120)
    assert process.exitcode == 0
    assert kept(tmp_path) == [1, 2]
    assert (tmp_path / "epochs.txt").read_text() == epochs
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    if on_error == "raise":
        assert "iteration 3 could not be written" in (tmp_path / "error.txt").read_text()


def published(folder: Path) -> int:
    """The iteration that ``latest`` names, without touching what the other process may be removing."""
    try:
        return int((folder / "checkpoints/latest").read_text().strip().removeprefix("iteration-").split(".")[0])
    except FileNotFoundError:
        return 0


def _train_long(folder: Path) -> None:
    fit(
        folder,
        ShardedCheckpoint(keep=2),
        Scored(ballast=2**20),
        max_epochs=1000,
        callbacks=[Slowly()],
        ckpt_path="last",
    )


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    moments, reached = random.Random(7), 0
    for _ in range(20):
        process = start(_train_long, tmp_path)
        deadline = time.monotonic() + 60
        while published(tmp_path) <= reached:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = complete_checkpoints(tmp_path / "checkpoints")
        reached = Manifest.load(found[0]).iteration
        assert problem(found[0], hashes=True) is None
        state = torch.load(found[0] / "state", weights_only=False)
        ballast = state["state_dict"]["ballast"]
        assert state["epoch"] == reached - 1
        assert torch.equal(ballast, torch.full_like(ballast, reached)), "never a mixture of two"
    assert reached >= 20


def test_sigterm_finishes_the_iteration_saves_and_ends(tmp_path):
    class Terminate(Callback):
        def on_train_batch_start(self, trainer: object, *args: object) -> None:
            if trainer.current_epoch == 1:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, ShardedCheckpoint(every_n_iterations=50, monitor=None), callbacks=[Terminate()], max_epochs=9)
    assert kept(tmp_path) == [2]
    assert signal.getsignal(signal.SIGTERM) == before
    whole = fit(tmp_path / "whole", ShardedCheckpoint(), max_epochs=9)
    resumed = fit(tmp_path, ShardedCheckpoint(), max_epochs=9, ckpt_path="last")
    assert torch.equal(resumed.weight, whole.weight)


def test_sigterm_in_the_sanity_check_finishes_the_first_iteration(tmp_path):
    class Terminate(Callback):
        def on_validation_start(self, trainer: object, *args: object) -> None:
            if trainer.sanity_checking:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGTERM)

    callback = ShardedCheckpoint(monitor=None)
    fit(tmp_path, callback, callbacks=[Terminate()], num_sanity_val_steps=1)
    assert kept(tmp_path) == [1]
    assert callback.interrupted
    fit(tmp_path, callback, max_epochs=1, ckpt_path="last")
    assert not callback.interrupted


def test_bad_settings_are_named(tmp_path):
    for settings, name in (({"keep": 0}, "keep"), ({"every_n_iterations": 0}, "every_n"), ({"mode": "up"}, "mode")):
        with pytest.raises((MisconfigurationException, ValueError), match=rf"ShardedCheckpoint(: |\.){name}"):
            ShardedCheckpoint(**settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match="cannot write to"):
        fit(tmp_path, ShardedCheckpoint(directory=tmp_path / "file/below"))
    with pytest.raises(MisconfigurationException, match="validation/succes'"):
        fit(tmp_path, ShardedCheckpoint(monitor="validation/succes"))


def test_a_checkout_that_is_not_installed_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr("spear_lightning.callbacks.checkpoint._PACKAGES", ("torch", "no-such-package"))
    fit(tmp_path, ShardedCheckpoint(monitor=None), max_epochs=1)
    newest = complete_checkpoints(tmp_path / "checkpoints")[0]
    versions = Manifest.load(newest).versions
    assert versions == {"torch": versions["torch"], "no-such-package": "not installed"}

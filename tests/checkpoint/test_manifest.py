"""A folder is a checkpoint as a whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from spear_lightning.checkpoint.manifest import (
    Manifest,
    complete_checkpoints,
    describe_files,
    discard,
    file_names,
    newest_checkpoint,
    problem,
    publish,
)


def make(directory: Path, iteration: int, written: float, score: float | None = None) -> Path:
    partial = directory / ".partial-x"
    (partial / "state/checkpoint").mkdir(parents=True)
    (partial / "state/latest").write_text("checkpoint")
    (partial / "state/checkpoint/shard.pt").write_bytes(bytes(range(256)) * 40)
    files = describe_files(partial, file_names(partial))
    Manifest(iteration, written, 2, "ZeroStrategy", 2, {"torch": "2"}, score, "a run", files).save(partial)
    return publish(partial, directory, iteration)


def test_what_is_published_is_whole_and_the_newest_is_found(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    one, two = make(tmp_path, 1, 10.0), make(tmp_path, 2, 20.0)
    assert one.name == "iteration-00001"
    assert problem(one, hashes=True) is None
    assert Manifest.load(two).files["state/checkpoint/shard.pt"].size == 10240
    assert newest_checkpoint(tmp_path) == two
    again = make(tmp_path, 1, 30.0)  # started over in the same folder
    assert again.name == "iteration-00001.2"
    assert newest_checkpoint(tmp_path) == again
    assert complete_checkpoints(tmp_path) == [again, two, one]
    discard(again)
    assert newest_checkpoint(tmp_path) == two, "latest names one that is gone"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "state/checkpoint/shard.pt").write_bytes(b"short"), "5 bytes instead of 10240"),
        (lambda folder: (folder / "state/latest").unlink(), "latest is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1'), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 9, "files": {}}'), "another version"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage, told):
    one, two = make(tmp_path, 1, 10.0), make(tmp_path, 2, 20.0)
    damage(two)
    assert told in str(problem(two))
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == one
    assert "iteration-00002" in caplog.text
    assert told in caplog.text


def test_a_changed_byte_shows_in_the_hash(tmp_path):
    one = make(tmp_path, 1, 10.0)
    shard = one / "state/checkpoint/shard.pt"
    content = bytearray(shard.read_bytes())
    content[77] ^= 1
    shard.write_bytes(bytes(content))
    assert problem(one) is None
    assert "hash" in str(problem(one, hashes=True))

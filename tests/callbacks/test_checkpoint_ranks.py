"""ShardedCheckpoint where two ranks write: kills at any moment, a disk that is full for one of them."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from spear_lightning.checkpoint.manifest import Manifest, complete_checkpoints, problem
from tests.callbacks.two_ranks import measure, train, train_limited
from tests.processes import start_ranks

pytestmark = pytest.mark.slow

UPDATES = 2
"""In an iteration."""


def published(folder: Path) -> int:
    """The iteration that ``latest`` names, without touching what the other processes may be removing."""
    try:
        return int((folder / "checkpoints/latest").read_text().strip().removeprefix("iteration-").split(".")[0])
    except FileNotFoundError:
        return 0


def check_that_it_is_of_one_piece(checkpoint: Path) -> int:
    """Weights, optimizer shards and rank files are of the iteration that the checkpoint names."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    assert problem(checkpoint, hashes=True) is None
    manifest = Manifest.load(checkpoint)
    weight = get_fp32_state_dict_from_zero_checkpoint(checkpoint / "state", tag="checkpoint")["weight"]
    assert torch.equal(weight, torch.full_like(weight, UPDATES * manifest.iteration)), "never a mixture of two"
    for rank in range(2):
        state = torch.load(checkpoint / f"ranks/rank-{rank:05d}.pt", weights_only=False)
        assert state == (rank, manifest.iteration - 1)
    return manifest.iteration


@pytest.mark.parametrize("stage", [2, 3])
def test_a_kill_of_one_or_both_ranks_at_any_moment_leaves_a_whole_checkpoint(tmp_path, stage):
    moments, reached, amid = random.Random(stage), 0, 0
    for attempt in range(10):
        ranks = start_ranks(2, train, tmp_path, stage, folder=tmp_path / f"printed-{attempt}")
        try:
            deadline = time.monotonic() + 60
            while published(tmp_path) <= reached:
                assert ranks.alive(), ranks.printed()
                assert time.monotonic() < deadline, ranks.printed()
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.25))
            ranks.kill(*moments.choice([(0,), (1,), (0, 1)]))
        finally:
            ranks.kill()
        amid += bool(list((tmp_path / "checkpoints").glob(".partial*")))
        newest, *older = complete_checkpoints(tmp_path / "checkpoints")
        reached = check_that_it_is_of_one_piece(newest)
        for checkpoint in older:
            check_that_it_is_of_one_piece(checkpoint)
    assert reached >= 10
    assert amid, "no kill hit the writing of a checkpoint: the test proves little"


@pytest.mark.parametrize(("stage", "rank"), [(2, 0), (2, 1), (None, 0)])  # under DDP only the first one writes much
@pytest.mark.parametrize("on_error", ["raise", "continue"])
def test_a_disk_that_is_full_for_one_rank_leaves_the_older_checkpoints(tmp_path, on_error, stage, rank):
    ranks = start_ranks(2, train_limited, tmp_path, stage, on_error, rank, folder=tmp_path / "printed")
    codes = ranks.join(60)
    assert sorted(Manifest.load(path).iteration for path in complete_checkpoints(tmp_path / "checkpoints")) == [1, 2]
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    if on_error == "raise":
        assert codes == [1, 1], "both end, neither waits for the other"
        assert f"iteration 3 could not be written to {tmp_path}/checkpoints: rank {rank}: " in ranks.printed("err")
    else:
        assert codes == [0, 0]
        assert [(tmp_path / f"epochs-{number}.txt").read_text() for number in range(2)] == ["4", "4"]


@pytest.mark.parametrize("stage", [2, 3])
def test_saving_holds_no_copy_of_a_shard(tmp_path, stage):
    size = 12_000_000
    ranks = start_ranks(2, measure, tmp_path, stage, size, folder=tmp_path / "printed")
    assert ranks.join(120) == [0, 0], ranks.printed()
    shard = 3 * 4 * size // 2  # its half of the weights and of both moments
    peaks = [int((tmp_path / f"peak-{rank}.txt").read_text()) for rank in range(2)]
    assert max(peaks) < 0.2 * shard, f"{peaks} bytes for shards of {shard}"

"""What a lost connection means is said once, and nothing else is taken for one."""

import pytest
import torch.distributed as dist

from spear_lightning.distributed import failures
from spear_lightning.distributed.failures import lost_rank

RESET = "[gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:26338: Connection reset by peer."
LATE = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (RuntimeError(RESET), "lost the connection"),
        (
            RuntimeError("Gloo connectFullMesh failed with timed out connecting: Connection refused"),
            "lost the connection",
        ),
        (RuntimeError(LATE), "time-out"),
        (RuntimeError("Application timeout caused pair closure"), "time-out"),
        (dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."), "time-out"),
        (
            dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
            "lost the connection",
        ),
    ],
)
def test_what_torch_says_is_explained(monkeypatch, error, means):
    monkeypatch.setattr(failures, "world_size", lambda: 2)
    explained = lost_rank(error)
    assert explained is not None
    assert means in str(explained)
    assert "--ckpt_path last" in str(explained)


def test_other_errors_are_left_alone(monkeypatch):
    assert lost_rank(RuntimeError("the tokenizer's server: connection refused")) is None, "there is no other rank"
    monkeypatch.setattr(failures, "world_size", lambda: 2)
    assert lost_rank(RuntimeError("The size of tensor a must match")) is None

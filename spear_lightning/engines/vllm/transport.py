"""How weights travel to vLLM servers: through a folder that both see, or by broadcast."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # they are there

from spear_lightning.distributed.collectives import rank
from spear_lightning.engines.vllm.buckets import buckets_of, join, send
from spear_lightning.engines.vllm.client import RefusedError, VLLMServer
from spear_lightning.engines.vllm.weights import PolicyWeights
from spear_lightning.policy.policy import Policy

_FILE_BYTES = 4 << 30


class WeightTransport(ABC):
    """Brings the policy's weights to a server, which is paused meanwhile. May be called by many threads."""

    @abstractmethod
    def send(self, server: VLLMServer, workers: list[dict[str, Any]], policy: Policy, label: str) -> None:
        """Bring the weights.

        Args:
            server: that takes them.
            workers: its description of its workers.
            policy: whose weights are whole on this rank.
            label: of these weights.

        Raises:
            ConnectionError: the server is gone.
            RuntimeError: it could not take them.
        """

    def close(self) -> None:  # noqa: B027 - there may be nothing to free
        """Free everything."""


class SharedFolder(WeightTransport):
    """Writes safetensors files that the servers read; each server's worker is told the folder.

    Args:
        folder: that trainer and servers see under the same path; a temporary one by default, which will do for servers
            on this machine. Only the latest weights are kept.
        seconds: after which a server that has not loaded them has failed.
    """

    def __init__(self, folder: str | None = None, seconds: float = 600.0) -> None:
        self.folder, self.seconds = folder, seconds
        self._root: Path | None = None
        self._lock = threading.Lock()

    def send(self, server: VLLMServer, workers: list[dict[str, Any]], policy: Policy, label: str) -> None:
        """Write the weights, unless another server has needed them already, and have them loaded."""
        with self._lock:
            written = self._write(policy, label, workers[0]["dtype"])
        server.load("spear_load_folder", str(written), seconds=self.seconds)

    def close(self) -> None:
        """Remove what was written."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def _write(self, policy: Policy, label: str, dtype: str) -> Path:
        if self._root is None:
            self._root = self._make_root()
        target = self._root / f"{label}-{dtype}"
        if target.exists():
            return target
        for old in self._root.iterdir():
            if not old.name.startswith(f"{label}-"):
                shutil.rmtree(old)
        making = self._root / f"{label}-{dtype}.part"
        making.mkdir()
        weights = PolicyWeights(policy, dtype)
        stream = iter(weights)
        for number, bucket in enumerate(buckets_of(weights.describe(), _FILE_BYTES)):
            tensors = dict(next(stream) for _ in bucket)
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, making / f"{number:05}.safetensors")
        making.rename(target)
        return target

    def _make_root(self) -> Path:
        if self.folder is None:
            return Path(tempfile.mkdtemp(prefix="spear-weights-"))
        root = Path(self.folder).expanduser().resolve() / f"rank{rank()}"
        try:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        except OSError as error:
            raise RefusedError(f"engine.transport.folder: {self.folder} cannot be written to: {error}") from error
        return root


@dataclass(frozen=True)
class _Group:
    name: str
    backend: str
    members: Any
    store: Any


class Broadcast(WeightTransport):
    """Broadcasts the weights in buckets to all workers of a server; nothing is written to a disk.

    Each server is a group of its own with this process, which is kept from sync to sync and made anew when the server
    has been restarted.

    Args:
        backend: ``"nccl"`` between GPUs, ``"gloo"`` otherwise; by default what policy and server allow.
        host: under which the servers reach this process; by default this machine's address on the way to them.
        seconds: after which a member of the group that does not answer has failed.
    """

    def __init__(
        self, backend: Literal["nccl", "gloo"] | None = None, host: str | None = None, seconds: float = 600.0
    ) -> None:
        self.backend, self.host, self.seconds = backend, host, seconds
        self._groups: dict[str, _Group] = {}

    def send(self, server: VLLMServer, workers: list[dict[str, Any]], policy: Policy, label: str) -> None:
        """Broadcast to the server's workers, each of which takes its part."""
        weights = PolicyWeights(policy, workers[0]["dtype"])
        device = policy.causal_lm.device
        backend = self.backend or ("nccl" if device.type == workers[0]["device"] == "cuda" else "gloo")
        group = self._groups.get(server.address)
        if group is None or any(worker["group"] != group.name for worker in workers):
            group = self._join(server, backend, len(workers) + 1)
        described = weights.describe()
        source = device if backend == "nccl" else torch.device("cpu")
        announced = [[weight.name, weight.dtype, list(weight.shape)] for weight in described]
        try:
            self._together(
                lambda: server.load("spear_receive", backend, announced, seconds=self.seconds),
                lambda: send(group.members, described, (tensor for _, tensor in weights), source),
            )
        except BaseException:
            self._groups.pop(server.address, None)  # its members are out of step
            raise

    def close(self) -> None:
        """Leave the groups."""
        self._groups.clear()

    def _join(self, server: VLLMServer, backend: str, size: int) -> _Group:
        name, host = uuid.uuid4().hex, self.host or _address_towards(server.address)
        store = TCPStore("0.0.0.0", 0, size, True, timedelta(seconds=self.seconds), wait_for_workers=False)
        arguments = (name, backend, host, store.port, size, self.seconds)
        members = self._together(
            lambda: server.load("spear_join", *arguments, seconds=self.seconds),
            lambda: join(backend, PrefixStore(name, store), 0, size, self.seconds),
        )
        self._groups[server.address] = _Group(name, backend, members, store)
        return self._groups[server.address]

    @staticmethod
    def _together(theirs: Callable[[], None], ours: Callable[[], Any]) -> Any:
        """Do both ends of a collective operation. What the server says has failed is the better message."""
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(theirs)
            try:
                done = ours()
            except RuntimeError:
                answer.result()
                raise
            answer.result()
            return done


def _address_towards(server: str) -> str:
    """This machine's address on the way to a server."""
    parts = urlsplit(server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "localhost", parts.port or 80))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])

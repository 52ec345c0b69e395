"""Weights to vLLM servers: through a folder that both see, or by broadcast."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # they are there
from typing_extensions import override

from spear_lightning.distributed.collectives import rank
from spear_lightning.engines.vllm.buckets import buckets_of, join, send
from spear_lightning.engines.vllm.client import RefusedError, VLLMServer
from spear_lightning.engines.vllm.weights import PolicyWeights
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.ranges import Above0, in_range

_FILE_BYTES = 4 << 30


class WeightTransport(ABC):
    """Sends the policy's weights to a server, which is paused meanwhile. May be called by many threads."""

    @abstractmethod
    def send(self, server: VLLMServer, workers: list[dict[str, Any]], policy: Policy, label: str) -> None:
        """Send the weights.

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


@in_range
class SharedFolder(WeightTransport):
    """Writes safetensors files that the servers read.

    Args:
        folder: that trainer and servers see under the same path; a temporary one by default, which will do for servers
            on this machine. Only the latest weights are kept.
        seconds: after which a server that has not loaded them has failed.
    """

    def __init__(self, folder: str | None = None, seconds: Above0 = 600.0) -> None:
        self.folder, self.seconds = folder, seconds
        self._root: Path | None = None
        self._lock = threading.Lock()

    @override
    def send(self, server: VLLMServer, workers: list[dict[str, Any]], policy: Policy, label: str) -> None:
        with self._lock:
            written = self._write(policy, label, workers[0]["dtype"])
        server.load("spear_load_folder", str(written), seconds=self.seconds)

    @override
    def close(self) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def _write(self, policy: Policy, label: str, dtype: str) -> Path:
        """The folder of these weights, written unless another server has needed them already."""
        self._root = self._root or self._make_root()
        target = self._root / f"{label}-{dtype}"
        if target.exists():
            return target
        for old in self._root.iterdir():
            if not old.name.startswith(f"{label}-"):
                shutil.rmtree(old)
        partial = target.with_name(f"{target.name}.part")
        partial.mkdir()
        weights = PolicyWeights(policy, dtype)
        stream = iter(weights)
        for number, bucket in enumerate(buckets_of(weights.describe(), _FILE_BYTES)):
            tensors = dict(next(stream) for _ in bucket)
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial / f"{number:05}.safetensors")
        return partial.rename(target)

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


class _Group(NamedTuple):
    name: str
    backend: Literal["nccl", "gloo"]
    members: Any
    store: Any  # kept alive as long as the group


@in_range
class Broadcast(WeightTransport):
    """Broadcasts the weights in buckets to all workers of a server; nothing is written to a disk.

    Each server forms a process group with this process, by NCCL between GPUs and Gloo otherwise. It is kept from sync
    to sync and made anew when the server has been restarted.

    Args:
        host: under which the servers reach this process; by default this machine's address on the way to them.
        seconds: after which a member of the group that does not answer has failed.
    """

    def __init__(self, host: str | None = None, seconds: Above0 = 600.0) -> None:
        self.host, self.seconds = host, seconds
        self._groups: dict[str, _Group] = {}

    @override
    def send(self, server: VLLMServer, workers: list[dict[str, Any]], policy: Policy, label: str) -> None:
        weights, device = PolicyWeights(policy, workers[0]["dtype"]), policy.causal_lm.device
        group = self._groups.get(server.address)
        if group is None or any(worker["group"] != group.name for worker in workers):
            nccl = device.type == workers[0]["device"] == "cuda"
            group = self._groups[server.address] = self._join(server, "nccl" if nccl else "gloo", len(workers) + 1)
        described = weights.describe()
        source = device if group.backend == "nccl" else torch.device("cpu")
        try:
            _collectively(
                lambda: server.load("spear_receive", group.backend, described, seconds=self.seconds),
                lambda: send(group.members, described, (tensor for _, tensor in weights), source),
            )
        except BaseException:
            self._groups.pop(server.address, None)  # its members are out of step
            raise

    @override
    def close(self) -> None:
        self._groups.clear()

    def _join(self, server: VLLMServer, backend: Literal["nccl", "gloo"], size: int) -> _Group:
        name, host = uuid.uuid4().hex, self.host or _address_towards(server.address)
        store = TCPStore("0.0.0.0", 0, size, True, timedelta(seconds=self.seconds), wait_for_workers=False)
        arguments = (name, backend, host, store.port, size, self.seconds)
        members = _collectively(
            lambda: server.load("spear_join", *arguments, seconds=self.seconds),
            lambda: join(backend, PrefixStore(name, store), 0, size, self.seconds),
        )
        return _Group(name, backend, members, store)


def _collectively(theirs: Callable[[], None], ours: Callable[[], Any]) -> Any:
    """Both ends of a collective operation; the result of ours. The server's failure is the better message."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(theirs)
        try:
            return ours()
        finally:
            answer.result()


def _address_towards(server: str) -> str:
    """This machine's address on the way to a server."""
    parts = urlsplit(server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "localhost", parts.port or 80))  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])

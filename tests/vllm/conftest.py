"""Tests against vLLM itself, in an environment of its own: ``make test-vllm``. Elsewhere they are skipped."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear_lightning.engines.base import Completion, Request, Sampling

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
WINDOW = 400


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed here: make test-vllm")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture
def tied_policy(tiny_policy: Callable[..., Any]) -> Callable[..., Any]:
    """Makes tied policies of one shape, with sharp distributions: ``tied_policy(seed)``."""

    def make(seed: int) -> Any:
        sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512, "initializer_range": 0.1}
        policy = tiny_policy("qwen2", config=sizes, seed=seed)
        assert policy.causal_lm.config.tie_word_embeddings
        return policy

    return make


class Server:
    """A vLLM server in a process of its own, on one port for good."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.log = folder / "server.log"
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        root = str(Path(__file__).parents[2])
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        options = {
            # Not the tokenizer in the model's folder: beside a config.json, Transformers takes it for the model type's.
            "tokenizer": self.folder / "tokenizer",
            "port": self.port,
            "host": "127.0.0.1",
            "dtype": "float32",
            "max-model-len": WINDOW,
            "max-num-seqs": 64,
            "logprobs-mode": "processed_logprobs",
            "worker-extension-cls": "spear_lightning.engines.vllm.worker.WeightReceiver",
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--enforce-eager", "--enable-scale-out", "--no-enable-chunked-prefill", *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables, "PYTHONPATH": root},
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it with its engine's process, without a chance to clean up."""
        os.killpg(self.process.pid, 9)
        self.process.wait()
        while self._is_open():
            time.sleep(0.05)

    def _is_open(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture(scope="module")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], Server]]:
    """The module's server; the first policy that it is asked for is the one it starts with."""
    servers: list[Server] = []

    def start(policy: Any) -> Server:
        if not servers:
            folder = tmp_path_factory.mktemp("served")
            policy.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder / "tokenizer")
            servers.append(Server(folder))
        return servers[0]

    yield start
    for server in servers:
        server.kill()


def requests(count: int = 6, prompt: int = 12, length: int = 16, temperature: float = 0.7) -> list[Request]:
    generator = np.random.default_rng(prompt)
    settings = Sampling(length, temperature, stop_ids=(8,))
    return [
        Request(
            f"s{number}", generator.integers(3, 40, prompt + number).astype(np.int32), settings, seed=2**62 + number
        )
        for number in range(count)
    ]


def assert_by(policy: Any, asked: list[Request], found: list[Completion]) -> None:
    """The log-probabilities are those of Hugging Face's model, in float32."""
    for request, completion in zip(asked, found, strict=True):
        ids = torch.tensor([[*request.prompt_ids.tolist(), *completion.ids.tolist()]])
        temperature = request.sampling.temperature or 1.0
        with torch.no_grad():
            own = policy(ids, torch.ones_like(ids), temperature).logps[0, len(request.prompt_ids) :]
        np.testing.assert_allclose(completion.logps, own.numpy(), atol=1e-4)
        assert len(completion.ids) > 0
        assert (completion.finish == "stop") == (completion.ids[-1] in request.sampling.stop_ids)

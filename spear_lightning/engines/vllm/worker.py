"""The receiving end of a weight sync, in vLLM's workers.

vLLM mixes :class:`WeightReceiver` into its workers when it is started with
``--worker-extension-cls spear_lightning.engines.vllm.worker.WeightReceiver``; its methods are then called by
``collective_rpc``. Nothing of the trainer is imported here, only PyTorch and safetensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # they are there

from spear_lightning.engines.vllm.buckets import Weight, join, receive


def _reporting(method: Callable[..., None]) -> Callable[..., str]:
    """A method that returns its failure, or nothing: an exception would end the whole engine."""

    @functools.wraps(method)
    def call(self: WeightReceiver, *arguments: Any) -> str:
        try:
            method(self, *arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return call


class WeightReceiver:
    """Methods of a vLLM worker, called on all workers of an engine at a time."""

    # What vLLM's worker is, whose class this one is added to.
    rank: int
    device: torch.device
    model_runner: Any
    vllm_config: Any

    def spear_describe(self) -> dict[str, Any]:
        """The model that is served, in JSON.

        Returns:
            ``sizes`` that tell models apart, ``dtype`` of the weights, ``device`` and the ``group`` that the worker
            receives weights in (empty if none).
        """
        model = self.vllm_config.model_config
        text = model.hf_text_config
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        return {
            "sizes": {name: getattr(text, name, None) for name in sizes},
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": torch.device(self.device).type,
            "group": getattr(self, "_spear_group_name", ""),
        }

    @_reporting
    def spear_load_folder(self, folder: str) -> None:
        """Load the safetensors files of a folder."""
        self._spear_load(_read(Path(folder)))

    def spear_load_tensors(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load tensors of this very process."""
        self._spear_load(iter(weights))

    @_reporting
    def spear_join(self, name: str, backend: str, host: str, port: int, size: int, seconds: float) -> None:
        """Join the process group that weights are broadcast in.

        Args:
            name: of the group; :meth:`spear_describe` tells it.
            backend: ``"nccl"`` or ``"gloo"``.
            host: where the trainer waits.
            port: of the trainer's store there.
            size: number of members, the trainer included.
            seconds: after which a member that does not answer has failed.
        """
        self._spear_group_name = ""
        store = TCPStore(host, port, size, False, timedelta(seconds=seconds))
        self._spear_group = join(backend, PrefixStore(name, store), self.rank + 1, size, seconds)
        self._spear_group_name = name

    @_reporting
    def spear_receive(self, backend: str, weights: Sequence[Sequence[Any]]) -> None:
        """Receive weights by broadcast and load them.

        Args:
            backend: of the group; gloo moves memory of the CPU.
            weights: name, type and shape of each, in the order they are sent in.
        """
        expected = [Weight(name, dtype, tuple(shape)) for name, dtype, shape in weights]
        name, self._spear_group_name = self._spear_group_name, ""  # who has not received everything is out of step
        self._spear_load(
            receive(self._spear_group, expected, torch.device(self.device if backend == "nccl" else "cpu"))
        )
        self._spear_group_name = name

    def _spear_load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.reload_weights(weights_iterator=weights)  # type: ignore[attr-defined] # of vLLM's worker
        for _ in weights:  # a sender must never be left waiting for a receiver that wants no more
            pass
        model = self.model_runner.get_model()
        head: Any = getattr(getattr(model, "language_model", model), "lm_head", None)
        # On a CPU a layer computes with a repacked copy of its weights. A head that is tied to the embedding has no
        # weights of its own to be reloaded, so vLLM leaves its copy as it was: wrong log-probabilities, without a word.
        if torch.device(self.device).type == "cpu" and hasattr(getattr(head, "quant_method", None), "apply"):
            head.quant_method.process_weights_after_loading(head)


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no safetensors files here: trainer and server must see the same folder (engine.transport)"
        )
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - not a dictionary
                yield name, content.get_tensor(name)

"""Rollouts by vLLM in the training process, on the GPU that also trains."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from spear_lightning.distributed.collectives import world_size
from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.engines.batches import check_requests
from spear_lightning.engines.vllm.requests import LOGPROBS_MODE, completion_of, empty_completion, sampling_fields
from spear_lightning.engines.vllm.weights import PolicyWeights
from spear_lightning.policy.policy import Policy

_RESERVED = ("model", "skip_tokenizer_init", "load_format", "logprobs_mode", "worker_extension_cls", "dtype")


class VLLMEngine(RolloutEngine):
    """Has vLLM generate within the training process; each rank has an engine of its own, on its own GPU.

    The engine is made at the first :meth:`sync` and given the policy's weights directly, each time anew. Between
    rollout phases it sleeps: on a GPU its weights and its cache are freed for the training.

    Responses are drawn from the request's seed by vLLM's own random numbers: the same seed gives the same tokens on the
    same vLLM, and other ones than another engine.

    Args:
        dtype: of vLLM's copy of the weights; ``auto`` takes that of the policy.
        max_length: longest sequence, prompt included; ``None`` takes what the model can.
        memory: share of the GPU's memory for weights and cache, taken during rollouts only.
        max_batch: most sequences decoded together.
        eager: do without compiled graphs: starts faster, generates slower on a GPU.
        free_memory: sleep between rollout phases (of no effect on a CPU).
        options: further arguments of ``vllm.LLM``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_length: int | None = None,
        memory: float = 0.4,
        max_batch: int = 256,
        eager: bool = False,
        free_memory: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"engine.max_length must be at least 2 (a prompt and a token), not {max_length}")
        if not 0 < memory < 1:
            raise ValueError(f"engine.memory must be between 0 and 1, not {memory}")
        if max_batch < 1:
            raise ValueError(f"engine.max_batch must be at least 1, not {max_batch}")
        if taken := sorted(set(options or ()) & set(_RESERVED)):
            raise ValueError(f"engine.options must not hold {', '.join(taken)}: the engine sets it")
        self.dtype, self.max_length, self.memory, self.max_batch = dtype, max_length, memory, max_batch
        self.eager, self.free_memory, self.options = eager, free_memory, dict(options or {})
        self._vllm: Any = None
        self._policy: Policy | None = None
        self._version = 0
        self._sleeping = False

    # --- the protocol --------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, device: torch.device) -> None:
        """Look whether vLLM is installed.

        Raises:
            ValueError: it is not.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "data.engine is VLLMEngine, but vLLM is not installed here: pip install 'spear-lightning[vllm]', or "
                "use VLLMServerEngine with a server elsewhere, or HuggingFaceEngine"
            )

    def sync(self, policy: Policy, version: int) -> None:
        """Take over the weights of ``policy`` and drop all keys and values made with older ones.

        Raises:
            ValueError: vLLM is not installed.
        """
        if self._vllm is None:
            self.prepare(policy, policy.causal_lm.device)
            self._vllm = self._start(policy)
        elif self._sleeping:
            self._vllm.wake_up(tags=["weights"])
        self._vllm.collective_rpc("spear_load_tensors", args=(PolicyWeights(policy, self._dtype_of(policy)),))
        if self._sleeping:
            self._vllm.wake_up(tags=["kv_cache"])
            self._sleeping = False
        if not self._vllm.reset_prefix_cache():
            raise RuntimeError("vLLM does not drop its prefix cache, although nothing is being generated")
        self._vllm.update_weight_version(str(version))
        self._policy, self._version = policy, version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Args:
            requests: with distinct sessions. A prompt that leaves no room for a token gets an empty completion that
                finishes by ``"length"``.

        Raises:
            RuntimeError: before the first :meth:`sync`, or asleep.
            ValueError: a request is malformed.
        """
        if self._policy is None or self._sleeping:
            raise RuntimeError("VLLMEngine.generate was called before sync: it has no weights")
        from vllm import SamplingParams

        check_requests(requests, self._policy.causal_lm.get_input_embeddings().num_embeddings)
        longest = int(self._vllm.llm_engine.model_config.max_model_len)
        completions = [empty_completion(self._version) for _ in requests]
        numbers, prompts, samplings = [], [], []
        for number, request in enumerate(requests):
            limit = min(request.sampling.max_new_tokens, longest - len(request.prompt_ids))
            if limit > 0:
                numbers.append(number)
                prompts.append({"prompt_token_ids": request.prompt_ids.tolist()})
                samplings.append(SamplingParams(**sampling_fields(request, limit)))
        if not numbers:
            return completions
        answers = self._vllm.generate(prompts, samplings, use_tqdm=False)
        for number, answer in zip(numbers, answers, strict=True):
            output = answer.outputs[0]
            logps = (entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
            versions = [span.version for span in output.weight_versions or ()]
            completions[number] = completion_of(
                requests[number], output.token_ids, logps, versions, str(self._version), self._version
            )
        return completions

    def end(self, session: str) -> None:
        """Nothing to free: the prefix cache forgets by itself."""

    def sleep(self) -> None:
        """Free the memory of weights and cache on a GPU."""
        if self._vllm is not None and self.free_memory and not self._sleeping and self._on_gpu():
            self._vllm.sleep(level=2)
            self._sleeping = True

    def wake(self) -> None:
        """Nothing yet: :meth:`sync`, which must follow, takes memory for the weights first and for the cache last."""

    def close(self) -> None:
        """Free everything."""
        if self._vllm is not None:
            self._vllm.llm_engine.engine_core.shutdown()
        self._vllm, self._policy, self._sleeping = None, None, False

    # --- vLLM ----------------------------------------------------------------------------------------------------

    def _start(self, policy: Policy) -> Any:
        settings: dict[str, Any] = {
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "load_format": "dummy",  # the weights come by sync
            "dtype": self._dtype_of(policy),
            "logprobs_mode": LOGPROBS_MODE,
            "worker_extension_cls": "spear_lightning.engines.vllm.worker.WeightReceiver",
            "max_model_len": self.max_length,
            "max_num_seqs": self.max_batch,
            "enforce_eager": self.eager,
            "enable_prefix_caching": True,
        }
        if policy.causal_lm.device.type == "cuda":
            settings |= {"gpu_memory_utilization": self.memory, "enable_sleep_mode": self.free_memory}
        else:  # a prompt fed in parts has its random numbers put back, which no generator of a CPU can
            settings["enable_chunked_prefill"] = False
        if world_size() > 1:  # each rank is a vLLM of its own, in the process that Lightning has started
            settings["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory(prefix="spear-vllm-") as folder, _in_process():
            configuration = copy.deepcopy(policy.causal_lm.config)
            configuration.architectures = [type(policy.causal_lm).__name__]
            configuration.save_pretrained(folder)
            from vllm import LLM

            return LLM(folder, **(settings | self.options))

    def _dtype_of(self, policy: Policy) -> str:
        return str(policy.causal_lm.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype

    def _on_gpu(self) -> bool:
        return self._policy is not None and self._policy.causal_lm.device.type == "cuda"


@contextlib.contextmanager
def _in_process() -> Iterator[None]:
    """Have vLLM start its engine in this process, not in one of its own, and leave this process's threads alone."""
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""Rollouts by vLLM in the training process, on the GPU that also trains."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from typing_extensions import override

from spear_lightning.distributed.collectives import world_size
from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.engines.batches import check_requests
from spear_lightning.engines.vllm.requests import LOGPROBS_MODE, completion_of, empty_completion, sampling_fields
from spear_lightning.engines.vllm.weights import PolicyWeights
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.ranges import Positive, in_range

_RESERVED = ("model", "skip_tokenizer_init", "load_format", "logprobs_mode", "worker_extension_cls", "dtype")


@in_range
class VLLMEngine(RolloutEngine):
    """Generates with vLLM in the training process; each rank has an engine of its own, on its own GPU.

    The engine is made at the first :meth:`sync`, and every sync hands it the policy's weights in memory. Between
    rollout phases it sleeps: on a GPU its weights and its cache are freed for the training.

    Responses are drawn from the request's seed by vLLM's own random numbers: the same seed gives the same tokens on the
    same vLLM, and other ones than another engine.

    Args:
        dtype: of vLLM's copy of the weights; ``auto`` takes that of the policy.
        max_length: longest sequence, prompt included, at least 2; ``None`` takes what the model can.
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
        max_length: Annotated[int, Ge(2)] | None = None,
        memory: Annotated[float, Gt(0), Lt(1)] = 0.4,
        max_batch: Positive = 256,
        eager: bool = False,
        free_memory: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        if taken := sorted(set(options or ()) & set(_RESERVED)):
            raise ValueError(f"engine.options must not hold {', '.join(taken)}: the engine sets it")
        self.dtype, self.max_length, self.memory, self.max_batch = dtype, max_length, memory, max_batch
        self.eager, self.free_memory, self.options = eager, free_memory, dict(options or {})
        self._vllm: Any = None
        self._policy: Policy | None = None
        self._version = 0
        self._sleeping = False

    # --- the protocol --------------------------------------------------------------------------------------------

    @override
    def prepare(self, policy: Policy, device: torch.device) -> None:
        """Check that vLLM is installed.

        Raises:
            ValueError: it is not.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "data.engine is VLLMEngine, but vLLM is not installed here: pip install 'spear-lightning[vllm]', or "
                "use VLLMServerEngine with a server elsewhere, or HuggingFaceEngine"
            )

    @override
    def sync(self, policy: Policy, version: int) -> None:
        """See the base class.

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

    @override
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See the base class. A prompt that leaves no room in the context window gets an empty completion.

        Raises:
            RuntimeError: before the first :meth:`sync`, or asleep.
            ValueError: a request is malformed.
        """
        if self._policy is None or self._sleeping:
            raise RuntimeError("VLLMEngine.generate was called before sync: it has no weights")
        from vllm import SamplingParams

        check_requests(requests, self._policy.causal_lm.get_input_embeddings().num_embeddings)
        longest = int(self._vllm.llm_engine.model_config.max_model_len)
        fields = sampling_fields(requests, longest)
        asked = [(request, values) for request, values in zip(requests, fields, strict=True) if values]
        prompts = [{"prompt_token_ids": request.prompt_ids.tolist()} for request, _ in asked]
        samplings = [SamplingParams(**values) for _, values in asked]
        answers = iter(self._vllm.generate(prompts, samplings, use_tqdm=False) if prompts else ())
        return [
            self._completion(request, next(answers).outputs[0]) if values else empty_completion(self._version)
            for request, values in zip(requests, fields, strict=True)
        ]

    @override
    def end(self, session: str) -> None:
        """Nothing to free: the prefix cache forgets by itself."""

    @override
    def sleep(self) -> None:
        on_gpu = self._policy is not None and self._policy.causal_lm.device.type == "cuda"
        if self._vllm is not None and self.free_memory and not self._sleeping and on_gpu:
            self._vllm.sleep(level=2)
            self._sleeping = True

    # Waking up is left to sync: it allocates the weights first and the cache last.

    @override
    def close(self) -> None:
        if self._vllm is not None:
            self._vllm.llm_engine.engine_core.shutdown()
        self._vllm, self._policy, self._sleeping = None, None, False

    def _completion(self, request: Request, output: Any) -> Completion:
        logps = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        versions = [span.version for span in output.weight_versions or ()]
        return completion_of(request, output.token_ids, logps, versions, str(self._version), self._version)

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
        # vLLM's engine in this process, whose threads it leaves alone.
        os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
        with tempfile.TemporaryDirectory(prefix="spear-vllm-") as folder:
            configuration = copy.deepcopy(policy.causal_lm.config)
            configuration.architectures = [type(policy.causal_lm).__name__]
            configuration.save_pretrained(folder)
            from vllm import LLM

            return LLM(folder, **(settings | self.options))

    def _dtype_of(self, policy: Policy) -> str:
        return str(policy.causal_lm.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype

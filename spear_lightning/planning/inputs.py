"""What a composed configuration says about memory: the model's shape, its numbers, the layout, the workload.

Nothing is started and no weights are read; strategy, optimizer and data module are instantiated and asked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.pytorch.strategies import Strategy
from torch import nn

from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.planning.layouts import layout_of, made, make_strategy, ranks_of_a_node
from spear_lightning.planning.shape import Numbers, Workload
from spear_lightning.planning.suggestions import Situation
from spear_lightning.policy.flops import causal_lm, shape_of
from spear_lightning.policy.loading import empty_model, fresh_model, load_tokenizer
from spear_lightning.policy.lora import LoRA, with_adapters
from spear_lightning.policy.policy import DTYPES
from spear_lightning.training.datamodule import RolloutDataModule
from spear_lightning.training.module import OptimizerFactory

_HALF = ("bf16-true", "bf16-mixed", "16-true", "16-mixed", "transformer-engine-float16", "transformer-engine")
_TRUE = {"bf16-true": 2, "16-true": 2, "64-true": 8}


def read_situation(config: Namespace, *, capacity: int | None, context: int | None) -> Situation:
    """Everything the formulas take, from a configuration as ``spear fit`` composes it.

    Args:
        config: of the subcommand ``fit``.
        capacity: bytes of a GPU, or of a node's RAM where there is none; ``None`` for what this machine has. Where it
            is given, ``accelerator: auto`` means GPUs even on a machine without.
        context: tokens of the longest sequence; ``None`` takes what agent, engine and model allow.

    Raises:
        ValueError: a part cannot be made, or there are no formulas for it; the message names the key.
    """
    trainer, policy = config.trainer, config.model.policy.init_args
    gpu = trainer.accelerator in ("gpu", "cuda") or (
        trainer.accelerator == "auto" and (capacity is not None or torch.cuda.is_available())
    )
    per_node, nodes = ranks_of_a_node(trainer.devices, gpu), int(trainer.num_nodes)
    strategy = make_strategy(trainer.strategy, per_node * nodes)
    layout = layout_of(strategy, per_node * nodes, per_node)
    causal = meta_model(policy)
    factory = made("model.optimizer", OptimizerFactory, config.model.optimizer)
    model = shape_of(causal)
    eager = "policy.attention is eager: the scores it keeps, heads times length a token and layer, are not planned"
    return Situation(
        model=model,
        numbers=numbers_of(trainer.precision, policy.dtype, strategy, factory),
        layout=layout,
        work=_workload(config, made("data", RolloutDataModule, config.data), causal, layout.ranks, context),
        nodes=nodes,
        capacity=machine_memory(gpu) if capacity is None else capacity,
        gpu=gpu,
        strategy=type(strategy).__name__,
        start=model.parameters * DTYPES[policy.dtype].itemsize,
        notes=(eager,) if policy.attention == "eager" else (),
    )


def machine_memory(gpu: bool) -> int:
    """Bytes of this machine's first GPU, or its RAM (or what a control group leaves of it).

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if gpu:
        if not torch.cuda.is_available():
            raise ValueError(
                "trainer.accelerator is gpu, and this machine has no GPU to read the memory off: give --memory 80GiB"
            )
        return int(torch.cuda.get_device_properties(0).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text(encoding="utf-8").strip() if group.is_file() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


# --- the model --------------------------------------------------------------------------------------------------------


def meta_model(policy: Namespace) -> nn.Module:
    """The policy's model on the meta device, with its adapters.

    Args:
        policy: the arguments of :class:`spear_lightning.policy.policy.Policy`.

    Raises:
        ValueError: as the policy itself would, but for what only weights can tell.
    """
    if (policy.model is None) == (policy.config is None):
        raise ValueError("policy: give either policy.model (a folder or hub id) or policy.config (a fresh model)")
    dtype = DTYPES[policy.dtype]
    if policy.model is not None:
        causal = empty_model(policy.model, "policy.model", dtype=dtype)
    else:
        tokenizer = load_tokenizer(policy.tokenizer or "", "policy.tokenizer")
        with torch.device("meta"):
            causal = fresh_model(policy.config, tokenizer, "policy.config", dtype=dtype, attention="sdpa", seed=0)
    if policy.lora is None:
        return causal
    lora: LoRA = made("policy.lora", LoRA, policy.lora)
    with torch.device("meta"):
        return with_adapters(causal, lora, 0)


# --- numbers ----------------------------------------------------------------------------------------------------------


def state_per_parameter(factory: OptimizerFactory) -> float:
    """Numbers of state an optimizer keeps per parameter, found by one step of a small matrix (AdamW: 2).

    Raises:
        ValueError: the optimizer cannot make the step.
    """
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer = factory([weight])
        optimizer.step()
    except Exception as error:  # whatever an optimizer of somebody else's makes of it
        raise ValueError(f"model.optimizer cannot be tried out: {error}") from error
    state = (value for values in optimizer.state.values() for value in values.values())
    return sum(value.numel() for value in state if isinstance(value, torch.Tensor) and value.dim()) / weight.numel()


def numbers_of(precision: Any, dtype: str, strategy: Strategy, factory: OptimizerFactory) -> Numbers:
    """Bytes of each kind of number.

    Args:
        precision: ``trainer.precision``.
        dtype: ``policy.dtype``.
        strategy: ZeRO steps on a float32 copy of the weights, of float32 weights too.
        factory: makes the optimizer.

    Raises:
        ValueError: Lightning knows no such precision.
    """
    precision = _convert_precision_to_unified_args(precision) or "32-true"
    own, half = DTYPES[dtype].itemsize, precision in _HALF
    if isinstance(strategy, ZeroStrategy):  # 16-bit weights for the "mixed" precisions too, without autocast
        weight = 2 if half else own
        master = 4 if half or strategy.stage else 0
        state = state_per_parameter(factory) * (4 if master else weight)
        return Numbers(weight, weight, weight, master, state)
    weight = _TRUE.get(precision, own)
    mixed = half and precision not in _TRUE
    compute = 2 if mixed else weight
    return Numbers(
        weight, compute, weight, state=weight * state_per_parameter(factory), cast=2 if mixed and weight > 2 else 0
    )


# --- the workload -----------------------------------------------------------------------------------------------------


def _workload(
    config: Namespace, data: RolloutDataModule, model: nn.Module, ranks: int, context: int | None
) -> Workload:
    positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    tasks = -(-data.rollouts.tasks // ranks)  # tasks are dealt over ranks, batches of an evaluation are each rank's own
    played = tasks * data.rollouts.group_size
    episodes, engine = max(played, data.evaluation.batch), data.engine
    sequences, decoded, limit, cache_gib = 0, 0, None, None  # an engine that is not known keeps nothing in this process
    if isinstance(engine, HuggingFaceEngine):
        decoded = min(episodes, engine.max_batch)
        sequences = episodes if engine.keep_cache else decoded
        limit, cache_gib = engine.max_length, engine.cache_gib
    prompt = getattr(data.agent, "max_prompt_tokens", None)  # where every turn has a prompt of its own
    own = None if prompt is None else prompt + data.max_response_tokens
    longest = min(value for value in (context, own, limit, positions, 2**20) if value)
    policy = config.model.policy.init_args
    replay = data.replay
    return Workload(
        tokens=max(data.max_tokens, longest),  # a longer row has a micro-batch of its own
        checkpointing=policy.gradient_checkpointing,
        chunk_bytes=policy.chunk_bytes,
        reference=config.model.reference_kl > 0 and policy.lora is None,
        sequences=sequences,
        sequence_tokens=longest,
        # A conversation is fed turn by turn: turns of about equal length.
        prompt_tokens=min(prompt or -(-longest // data.max_turns), longest),
        played=min(sequences, played),
        decoded=decoded,
        cache_limit=None if cache_gib is None else int(cache_gib * 2**30),
        replay_entries=0 if replay is None else replay.schedule.limit(replay.capacity),
    )

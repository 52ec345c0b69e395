"""How much memory a training run needs on each rank, part by part, before any of it is started. All in bytes.

Notation: Ψ parameters, of which Ψₜ are trained; N ranks; b bytes of a weight, c of an activation, r of the residual
stream; L layers of width h with an MLP of width f, queries of width q and keys of width k; V vocabulary entries; t
tokens of a micro-batch.

Sources: Rajbhandari et al., "ZeRO" (arXiv 1910.02054), for what a stage partitions; the code of DeepSpeed 0.19 and of
transformers' Qwen2 for buffers and for what autograd keeps. ``benchmarks/memory.py`` measures each part
(docs/scaling.md has the result).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from spear_lightning.engines.huggingface.forward import PREFILL_TOKENS
from spear_lightning.planning.shape import Layout, Numbers, Place, Workload
from spear_lightning.policy.flops import ModelShape

Phase = Literal["generation", "backward", "step"]

PHASES: tuple[Phase, ...] = ("generation", "backward", "step")
"""Of an iteration: episodes are played; gradients are computed; the optimizer steps."""

REPLAY_TOKEN = 4 + 4
"""Bytes of a replayed token at most: id and log-probability. What was not generated has none, and what rows repeat of
each other is stored once; weights (``model.correction.cap``) are not counted. See
:mod:`spear_lightning.data.token_pool`; ``benchmarks/storage.py`` measures it."""

_FLOAT32 = 4


@dataclass(frozen=True)
class Part:
    """Memory of one kind on one rank.

    Attributes:
        name: of the part.
        bytes: of one rank.
        place: where it lies.
        phases: in which it is held.
    """

    name: str
    bytes: int
    place: Place = "device"
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True)
class MemoryPlan:
    """All parts of one rank.

    Attributes:
        parts: those that are not empty.
        ranks_per_node: that share a node's host memory.
    """

    parts: tuple[Part, ...]
    ranks_per_node: int

    def total(self, phase: Phase, place: Place = "device") -> int:
        """Bytes of one rank that are held in a phase."""
        return sum(part.bytes for part in self.parts if part.place == place and phase in part.phases)

    @property
    def peak_phase(self) -> Phase:
        """The phase that needs most of the device."""
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the device that one rank needs."""
        return self.total(self.peak_phase)

    @property
    def host(self) -> int:
        """Bytes of host memory that the ranks of a node need together."""
        return self.ranks_per_node * max(self.total(phase, "host") for phase in PHASES)

    def bytes_of(self, name: str) -> int:
        """Of the part with that name, wherever it lies; 0 if there is none."""
        return sum(part.bytes for part in self.parts if part.name == name)

    def on_cpu(self) -> MemoryPlan:
        """The same where the device is the host: everything but what lies on a disk shares its memory."""
        moved = (replace(part, place="device") if part.place == "host" else part for part in self.parts)
        return replace(self, parts=tuple(moved))


def plan_memory(model: ModelShape, numbers: Numbers, layout: Layout, work: Workload) -> MemoryPlan:
    """The memory of one rank, by part.

    What it leaves out: what CUDA and its libraries take for themselves, fragmentation, the rollouts of the current
    iteration on the host.

    Args:
        model: its shape.
        numbers: bytes of each kind of number.
        layout: what is partitioned, and where it lies.
        work: what goes through the model.
    """
    return MemoryPlan(tuple(part for part in _parts(model, numbers, layout, work) if part.bytes), layout.ranks_per_node)


def _parts(model: ModelShape, numbers: Numbers, layout: Layout, work: Workload) -> Iterable[Part]:
    weights = numbers.weight * model.parameters
    gradients = -(-numbers.weight * model.trainable // layout.gradients)
    update: tuple[Phase, ...] = ("backward", "step")
    yield Part("parameters", -(-weights // layout.parameters), layout.parameter_place)
    offloaded: Place = "device" if layout.optimizer_place == "device" else "host"
    yield Part("gradients", gradients, offloaded, PHASES if layout.keeps_gradients else update)
    yield Part("optimizer", optimizer_bytes(model, numbers, layout), layout.optimizer_place)
    if layout.step_gradients:
        stepped = -(-_FLOAT32 * model.trainable // layout.optimizer)
        yield Part("float32 gradients", stepped, offloaded, ("step",) if offloaded == "device" else PHASES)
    # ZeRO-1 and 2 free the gradients once they have the float32 copy: what the optimizer computes takes their place.
    freed = gradients if layout.step_gradients and not layout.keeps_gradients else 0
    temporaries = max(0, step_bytes(model, numbers, layout) - freed)
    yield Part("optimizer temporaries", temporaries, offloaded, ("step",))
    if work.reference:
        yield Part("reference", weights)
    communication = bucket_bytes(model, numbers, layout)
    # DDP's buckets and ZeRO-3's stay; ZeRO-1's and 2's are made for each backward pass.
    stays = layout.gradient_copy or layout.parameters > 1
    yield Part("communication buckets", communication, phases=PHASES if stays else ("backward",))
    yield Part("passing gradients", passing_bytes(model, numbers, layout), phases=("backward",))
    if layout.stage == 3:
        gathered = numbers.weight * max(model.largest, min(model.parameters, layout.live))
        yield Part("gathered parameters", gathered, phases=("backward",))
    yield Part("activations", activation_bytes(model, numbers, work.tokens, work.checkpointing), phases=("backward",))
    yield Part("temporaries", temporary_bytes(model, numbers, work), phases=("backward",))
    if layout.stage == 3:
        yield Part("generation replica", weights, phases=("generation",) if layout.free_replica else PHASES)
    columns = cache_columns(work.prompt_tokens, work.sequence_tokens)
    cache = cache_bytes(model, numbers, work.sequences, columns) if work.cache_limit is None else work.cache_limit
    yield Part("generation cache", cache, phases=("generation",))
    yield Part("generation temporaries", generation_bytes(model, numbers, work), phases=("generation",))
    entries = -(-work.replay_entries // layout.ranks)
    yield Part("replay", replay_bytes(entries, work.sequence_tokens), "host")


def optimizer_bytes(model: ModelShape, numbers: Numbers, layout: Layout) -> int:
    """Moments and float32 master weights: ``(state + master) Ψₜ / N``; ZeRO keeps masters of float32 weights too."""
    return -(-int((numbers.state + numbers.master) * model.trainable) // layout.optimizer)


def step_bytes(model: ModelShape, numbers: Numbers, layout: Layout) -> int:
    """What an optimizer of Adam's kind computes on the way, for all parameters at once.

    Under ZeRO the square root and the quotient, as large as both moments (PyTorch sees one flat parameter); else the
    square root alone (``foreach``, PyTorch's way on GPUs; on a CPU it goes parameter by parameter and needs less).
    """
    share = 1.0 if layout.step_gradients else 0.5
    return int(share * numbers.state * model.trainable) // layout.optimizer


def bucket_bytes(model: ModelShape, numbers: Numbers, layout: Layout) -> int:
    """DDP copies all gradients into its buckets: ``b Ψₜ``; ZeRO has buckets of a fixed size, whatever the model's."""
    elements = model.trainable if layout.gradient_copy else layout.buckets * layout.bucket
    return numbers.weight * elements


def passing_bytes(model: ModelShape, numbers: Numbers, layout: Layout) -> int:
    """Gradients that ZeRO-2 and 3 hold until they are reduced.

    The largest one (the embedding's) may not fit into a bucket and is sent by itself. Stage 2 also has its partition
    of the current micro-batch beside the accumulated one.
    """
    if layout.gradients == 1:
        return 0
    accumulated = -(-model.trainable // layout.gradients) if layout.stage == 2 else 0
    return numbers.weight * (min(model.largest, model.trainable) + accumulated)


def layer_bytes(model: ModelShape, numbers: Numbers, tokens: int) -> int:
    """What one layer keeps for its backward pass.

    Per token, two norms of ``(4 + r + c) h`` (input in float32, normalised, scaled), ``2 c (q + k)`` for queries, keys,
    values and what attention puts out, 4 bytes a head for its normaliser, and ``4 c f`` for gate, activated gate, up
    and their product. Attention is fused (``sdpa``, ``flash_attention_2``): no scores are kept.
    """
    norms = 2 * (_FLOAT32 + numbers.residual + numbers.compute) * model.hidden
    attention = 2 * numbers.compute * (model.queries + model.keys) + _FLOAT32 * model.heads
    return tokens * (norms + attention + 4 * numbers.compute * model.intermediate)


def activation_bytes(model: ModelShape, numbers: Numbers, tokens: int, checkpointing: bool) -> int:
    """What is kept from the forward to the backward pass of a micro-batch.

    All layers, or with gradient checkpointing the inputs ``r h t`` of each; the last norm; the head's input; under
    autocast a copy of the weights.
    """
    each = tokens * numbers.residual * model.hidden if checkpointing else layer_bytes(model, numbers, tokens)
    last = tokens * (_FLOAT32 + numbers.residual + numbers.compute) * model.hidden
    return model.layers * each + last + numbers.cast * model.parameters


def temporary_bytes(model: ModelShape, numbers: Numbers, work: Workload) -> int:
    """The most that the backward pass needs for a moment: in the output head, or in a layer.

    The chunked head has its chunk (``4 · 4 V`` bytes a token, bounded) and twice the gradient of its weights, summed in
    float32 (:mod:`spear_lightning.policy.logprobs`). A layer has the gradients of its MLP, and with checkpointing what
    it recomputes.
    """
    summed = (_FLOAT32 + numbers.compute) * model.vocabulary * model.hidden if model.head_trained else 0
    head = min(work.chunk_bytes, 16 * model.vocabulary * work.tokens) + summed
    layer = work.tokens * numbers.compute * (3 * model.intermediate + 2 * model.hidden)
    if work.checkpointing:
        layer += layer_bytes(model, numbers, work.tokens)
    return max(head, layer)


def cache_columns(prompt: int, longest: int) -> int:
    """Columns of the key-value cache once a sequence has grown to ``longest`` tokens.

    It starts at the prompt and grows by half, in multiples of 64
    (:class:`~spear_lightning.engines.huggingface.kv_cache`).
    """
    columns = _rounded(min(prompt, longest))
    while columns < longest:
        columns = _rounded(max(columns + 1, columns * 3 // 2))
    return columns


def cache_bytes(model: ModelShape, numbers: Numbers, sequences: int, columns: int) -> int:
    """Keys and values: ``2 L k b`` a token, in the weights' precision."""
    return 2 * model.layers * model.keys * numbers.weight * sequences * columns


def generation_bytes(model: ModelShape, numbers: Numbers, work: Workload) -> int:
    """The most that generation needs for a moment: to feed prompts through an MLP, or to draw tokens (float64 sums)."""
    fed = min(PREFILL_TOKENS, work.sequences * work.prompt_tokens)
    prefill = fed * numbers.weight * (3 * model.intermediate + 2 * model.hidden)
    sampling = min(work.sequences, work.decoded) * model.vocabulary * (numbers.weight + 3 * _FLOAT32 + 2 * 8)
    return max(prefill, sampling)


def replay_bytes(entries: int, tokens: int) -> int:
    """Arrays of replayed rows of so many tokens each."""
    return entries * tokens * REPLAY_TOKEN


def _rounded(columns: int) -> int:
    return -(-columns // 64) * 64

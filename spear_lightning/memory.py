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
from dataclasses import dataclass, field, replace
from typing import Literal

Phase = Literal["generation", "backward", "step"]
Place = Literal["device", "host", "disk"]

PHASES: tuple[Phase, ...] = ("generation", "backward", "step")
"""Of an iteration: episodes are played; gradients are computed; the optimizer steps."""

REPLAY_TOKEN = 4 + 1 + 4 + 4 + 2
"""Bytes of a replayed token: id, mask, log-probability, advantage, turn (:class:`spear_lightning.rollout.Row`)."""

PREFILL_TOKENS = 16_384
"""Tokens that the engine feeds at once at most (:func:`spear_lightning.engines.batches.similar_lengths`)."""

_FLOAT32 = 4


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only language model that memory and cost depend on.

    Attributes:
        parameters: Ψ, tied ones once, adapters included.
        trainable: Ψₜ, those that get a gradient.
        largest: parameters of the largest single module (an embedding, as a rule).
        layers: L.
        hidden: h, width of the residual stream.
        intermediate: f, width of the MLP.
        queries: q, query heads times their size.
        keys: k, key-value heads times their size.
        heads: query heads.
        vocabulary: V.
    """

    parameters: int
    trainable: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int

    @property
    def head_trained(self) -> bool:
        """Whether the output head gets a gradient (with adapters it does not)."""
        return self.trainable == self.parameters


@dataclass(frozen=True)
class Numbers:
    """Bytes of each kind of number.

    Attributes:
        weight: b, of a parameter and of its gradient.
        compute: c, of what matrix products read and write.
        residual: r, of the residual stream.
        master: of the float32 copy that the optimizer steps on; 0 where it steps on the weights themselves.
        state: of the optimizer's state per trained parameter, all of its moments together.
        cast: of the weight copies that autocast makes and autograd keeps; 0 without autocast.
    """

    weight: int = 4
    compute: int = 4
    residual: int = 4
    master: int = 0
    state: float = 8
    cast: int = 0


@dataclass(frozen=True)
class Layout:
    """What a strategy partitions, where it puts it, and what it needs to communicate.

    Attributes:
        ranks: N.
        ranks_per_node: of these on one node.
        parameters: over how many ranks they are partitioned; 1 is not at all.
        gradients: likewise.
        optimizer: likewise, float32 master weights included.
        parameter_place: where partitioned parameters lie.
        optimizer_place: where optimizer state, master weights and the gradients they are stepped with lie.
        keeps_gradients: gradients stay allocated while episodes are played.
        gradient_copy: gradients are copied whole into buckets (DDP).
        step_gradients: the optimizer is given a float32 copy of the gradients (ZeRO).
        bucket: elements of one communication bucket.
        buckets: such buckets at a time.
        incoming: the gradients of a micro-batch stand beside those of the ones before (ZeRO-2).
        live: elements of partitioned parameters that may be gathered at a time.
        replica: each rank generates from a full copy.
        free_replica: and frees it before the update.
    """

    ranks: int = 1
    ranks_per_node: int = 1
    parameters: int = 1
    gradients: int = 1
    optimizer: int = 1
    parameter_place: Place = "device"
    optimizer_place: Place = "device"
    keeps_gradients: bool = True
    gradient_copy: bool = False
    step_gradients: bool = False
    bucket: int = 0
    buckets: int = 0
    incoming: bool = False
    live: int = 0
    replica: bool = False
    free_replica: bool = True

    @classmethod
    def single(cls) -> Layout:
        """One process."""
        return cls()

    @classmethod
    def ddp(cls, ranks: int, ranks_per_node: int, gradient_copy: bool = True) -> Layout:
        """Everything on every rank; gradients twice, unless ``gradient_as_bucket_view`` is set."""
        return cls(ranks, ranks_per_node, gradient_copy=gradient_copy)

    @classmethod
    def zero(
        cls,
        stage: int,
        ranks: int,
        ranks_per_node: int,
        *,
        bucket: int = 200_000_000,
        overlap: bool = True,
        live: int = 1_000_000_000,
        optimizer_place: Place = "device",
        parameter_place: Place = "device",
        free_replica: bool = True,
    ) -> Layout:
        """DeepSpeed's ZeRO.

        Args:
            stage: 0 partitions nothing, 1 the optimizer state, 2 gradients as well, 3 parameters as well.
            ranks: N.
            ranks_per_node: of these on one node.
            bucket: elements of the reduce bucket (Lightning's default).
            overlap: reduce while the backward pass goes on, which takes a second bucket in stage 2.
            live: elements that stage 3 may keep gathered (DeepSpeed's ``stage3_max_live_parameters``).
            optimizer_place: where offloading puts the optimizer's state.
            parameter_place: where offloading puts stage 3's parameters.
            free_replica: as of ``ZeroStrategy``.
        """
        return cls(
            ranks,
            ranks_per_node,
            parameters=ranks if stage == 3 else 1,
            gradients=ranks if stage >= 2 else 1,
            optimizer=ranks if stage >= 1 else 1,
            parameter_place=parameter_place if stage == 3 else "device",
            optimizer_place=optimizer_place,
            keeps_gradients=stage == 3,
            step_gradients=stage >= 1,
            bucket=bucket if stage >= 1 else 0,
            buckets=(0, 1, 2 if overlap else 1, 1)[stage],
            incoming=stage == 2,
            live=live if stage == 3 else 0,
            replica=stage == 3,
            free_replica=free_replica,
        )


@dataclass(frozen=True)
class Workload:
    """What goes through the model.

    Attributes:
        tokens: t, rows times padded length of a micro-batch.
        checkpointing: layers are recomputed in the backward pass.
        chunk_bytes: bound on the temporaries of the chunked output head.
        reference: a frozen copy of the policy stands beside it.
        sequences: whose keys and values are kept at a time, on this rank.
        played: of these in a training rollout; an evaluation may play more at a time.
        sequence_tokens: of the longest of them.
        prompt_tokens: the longest that is fed at once.
        decoded: sequences that are decoded together at most.
        replay_entries: in the buffers of all ranks together.
        replay_tokens: of an entry at most.
    """

    tokens: int
    checkpointing: bool = False
    chunk_bytes: int = 512 << 20
    reference: bool = False
    sequences: int = 0
    played: int = 0
    sequence_tokens: int = 0
    prompt_tokens: int = 0
    decoded: int = 0
    replay_entries: int = 0
    replay_tokens: int = 0


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

    parts: tuple[Part, ...] = field(default=())
    ranks_per_node: int = 1

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

    What it leaves out: the CUDA context and the libraries' workspaces (about a GiB), fragmentation, the rollouts of the
    current iteration on the host.

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
    always: tuple[Phase, ...] = PHASES
    update: tuple[Phase, ...] = ("backward", "step")
    yield Part("parameters", -(-weights // layout.parameters), layout.parameter_place)
    offloaded: Place = "device" if layout.optimizer_place == "device" else "host"
    yield Part("gradients", gradients, offloaded, always if layout.keeps_gradients else update)
    yield Part("optimizer", optimizer_bytes(model, numbers, layout), layout.optimizer_place)
    if layout.step_gradients:
        stepped = -(-_FLOAT32 * model.trainable // layout.optimizer)
        yield Part("float32 gradients", stepped, offloaded, ("step",) if offloaded == "device" else always)
    # ZeRO-1 and 2 free the gradients once they have the float32 copy: what the optimizer computes takes their place.
    freed = gradients if layout.step_gradients and not layout.keeps_gradients else 0
    temporaries = max(0, step_bytes(model, numbers, layout) - freed)
    yield Part("optimizer temporaries", temporaries, offloaded, ("step",))
    if work.reference:
        yield Part("reference", weights)
    communication = bucket_bytes(model, numbers, layout)
    # DDP's buckets and ZeRO-3's stay; ZeRO-1's and 2's are made for each backward pass.
    stays = layout.gradient_copy or layout.parameters > 1
    yield Part("communication buckets", communication, phases=always if stays else ("backward",))
    yield Part("passing gradients", passing_bytes(model, numbers, layout), phases=("backward",))
    if layout.live:
        gathered = numbers.weight * max(model.largest, min(model.parameters, layout.live))
        yield Part("gathered parameters", gathered, phases=("backward",))
    yield Part("activations", activation_bytes(model, numbers, work.tokens, work.checkpointing), phases=("backward",))
    yield Part("temporaries", temporary_bytes(model, numbers, work), phases=("backward",))
    if layout.replica:
        yield Part("generation replica", weights, phases=("generation",) if layout.free_replica else always)
    columns = cache_columns(work.prompt_tokens, work.sequence_tokens)
    cache = cache_bytes(model, numbers, work.sequences, columns)
    yield Part("generation cache", cache, phases=("generation",))
    yield Part("generation temporaries", generation_bytes(model, numbers, work), phases=("generation",))
    entries = -(-work.replay_entries // layout.ranks)
    yield Part("replay", replay_bytes(entries, work.replay_tokens), "host")


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
    accumulated = -(-model.trainable // layout.gradients) if layout.incoming else 0
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
    float32 (:mod:`spear_lightning.logprobs`). A layer has the gradients of its MLP, and with checkpointing what
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

    It starts at the prompt and grows by half, in multiples of 64 (:class:`~spear_lightning.engines.key_values`).
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

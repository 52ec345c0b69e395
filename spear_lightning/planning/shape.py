"""The numbers of a run that its memory and cost depend on, beside the model's: precision, strategy, workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "disk"]


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
        gradient_copy: gradients are copied whole into buckets (DDP, unless ``gradient_as_bucket_view`` is set).
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
        cache_limit: bytes that the cache is given, whatever the sequences need; ``None`` gives it what they need.
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
    cache_limit: int | None = None
    replay_entries: int = 0
    replay_tokens: int = 0

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
        stage: of ZeRO: 0 partitions nothing, 1 the optimizer state, 2 gradients as well, 3 parameters as well; ``None``
            where the strategy is another.
        gradient_copy: gradients are copied whole into buckets (DDP, unless ``gradient_as_bucket_view`` is set).
        bucket: elements of ZeRO's reduce bucket (Lightning's default).
        overlap: ZeRO reduces while the backward pass goes on, which takes a second bucket in stage 2.
        live: elements that stage 3 may keep gathered (DeepSpeed's ``stage3_max_live_parameters``).
        optimizer_place: where optimizer state, master weights and the gradients they are stepped with lie.
        parameter_place: where the parameters lie that stage 3 partitions.
        free_replica: stage 3 frees the full copy that each rank generates from before the update.
    """

    ranks: int = 1
    ranks_per_node: int = 1
    stage: int | None = None
    gradient_copy: bool = False
    bucket: int = 200_000_000
    overlap: bool = True
    live: int = 1_000_000_000
    optimizer_place: Place = "device"
    parameter_place: Place = "device"
    free_replica: bool = True

    @property
    def parameters(self) -> int:
        """Over how many ranks parameters are partitioned; 1 is not at all."""
        return self.ranks if self.stage == 3 else 1

    @property
    def gradients(self) -> int:
        """Likewise gradients."""
        return self.ranks if self.stage in (2, 3) else 1

    @property
    def optimizer(self) -> int:
        """Likewise the optimizer's state, float32 master weights included."""
        return self.ranks if self.stage else 1

    @property
    def buckets(self) -> int:
        """ZeRO's communication buckets at a time."""
        return (0, 1, 2 if self.overlap else 1, 1)[self.stage or 0]

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay allocated while episodes are played."""
        return self.stage in (None, 3)

    @property
    def step_gradients(self) -> bool:
        """Whether the optimizer is given a float32 copy of the gradients."""
        return bool(self.stage)


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
        sequence_tokens: of the longest of them, and of a replayed sample at most.
        prompt_tokens: the longest that is fed at once.
        decoded: sequences that are decoded together at most.
        cache_limit: bytes that the cache is given, whatever the sequences need; ``None`` gives it what they need.
        replay_entries: in the buffers of all ranks together.
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

"""What would make a run fit that does not: each change by itself, and if none is enough, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from spear_lightning.planning.memory import MemoryPlan, plan_memory
from spear_lightning.planning.shape import Layout, Numbers, Workload
from spear_lightning.policy.flops import ModelShape

_MOST_NODES = 64


@dataclass(frozen=True)
class Situation:
    """A planned run and the memory there is for it.

    Attributes:
        model: its shape.
        numbers: bytes of each kind of number.
        layout: what is partitioned.
        work: what goes through the model.
        nodes: number of them.
        capacity: bytes of a GPU; of a node's RAM where there is none.
        gpu: whether the devices are GPUs.
        strategy: its class name.
        zero: the stage, where the strategy is ZeRO.
        start: bytes of the whole start policy, which each rank loads into host memory.
        notes: what the figures do not say.
    """

    model: ModelShape
    numbers: Numbers
    layout: Layout
    work: Workload
    nodes: int
    capacity: int
    gpu: bool
    strategy: str
    zero: int | None
    start: int
    notes: tuple[str, ...]

    @property
    def plan(self) -> MemoryPlan:
        """Memory of a rank, by part; on CPUs nothing lies anywhere but in RAM or on a disk."""
        plan = plan_memory(self.model, self.numbers, self.layout, self.work)
        return plan if self.gpu else plan.on_cpu()

    @property
    def needed(self) -> int:
        """Bytes that must fit into :attr:`capacity`: of a rank on a GPU, of all ranks of a node in RAM."""
        return self.plan.peak * (1 if self.gpu else self.layout.ranks_per_node)

    @property
    def fits(self) -> bool:
        """Whether they do."""
        return self.needed <= self.capacity


@dataclass(frozen=True)
class Suggestion:
    """A change that makes it fit.

    Attributes:
        change: what to set.
        needed: bytes that are needed then.
    """

    change: str
    needed: int


def suggestions(situation: Situation) -> list[Suggestion]:
    """The changes that make a run fit.

    Args:
        situation: that does not fit.

    Returns:
        All single changes that are enough; if there are none, the shortest prefix of all of them that is; empty if even
        that is not enough.
    """
    single = [(text, changed) for text, changed in _changes(situation) if changed.fits]
    if single:
        return [Suggestion(text, changed.needed) for text, changed in single]
    texts: list[str] = []
    while not situation.fits:
        better = next(((t, c) for t, c in _changes(situation) if c.needed < situation.needed), None)
        if better is None:
            return []
        texts.append(better[0])
        situation = better[1]
    return [Suggestion(" and ".join(_last_of_each(texts)), situation.needed)]


def _changes(now: Situation) -> Iterator[tuple[str, Situation]]:
    """Single changes from cheap to dear."""
    if not now.work.checkpointing:
        work = replace(now.work, checkpointing=True)
        yield "--model.policy.gradient_checkpointing true", replace(now, work=work)
    if now.work.played < now.work.sequences:
        work = replace(now.work, sequences=now.work.played, decoded=min(now.work.decoded, now.work.played))
        yield f"--data.evaluation.batch {now.work.played}", replace(now, work=work)
    least = max(1024, now.work.replay_tokens, now.work.sequence_tokens)  # a longer row is not cut
    tokens = now.work.tokens // 2
    while tokens >= least:
        smaller = replace(now, work=replace(now.work, tokens=tokens))
        if smaller.fits or tokens // 2 < least:
            yield f"--data.max_tokens {tokens}", smaller
            break
        tokens //= 2
    if now.layout.ranks > 1:
        for stage in range((now.zero or 0) + 1, 4):
            yield f"-c configs/strategy/zero{stage}.yaml", _at_stage(now, stage)
    if now.zero and now.gpu and now.layout.optimizer_place == "device":
        layout = replace(now.layout, optimizer_place="host")
        yield "--trainer.strategy.init_args.offload_optimizer true", replace(now, layout=layout)
    if now.zero == 3 and now.gpu and now.layout.parameter_place == "device":
        layout = replace(now.layout, parameter_place="host")
        yield "--trainer.strategy.init_args.offload_parameters true", replace(now, layout=layout)
    if now.zero:
        nodes = 2 * now.nodes
        while nodes <= _MOST_NODES:
            more = _on_nodes(now, nodes)
            if more.fits or nodes == _MOST_NODES:
                yield f"--trainer.num_nodes {nodes}", more
                break
            nodes *= 2


def _at_stage(now: Situation, stage: int) -> Situation:
    """The same under another stage of ZeRO; a bucket never needs to be larger than what is given."""
    before = now.layout
    layout = Layout.zero(
        stage,
        before.ranks,
        before.ranks_per_node,
        bucket=before.bucket or 200_000_000,
        overlap=stage >= 2,
        optimizer_place=before.optimizer_place,
        free_replica=before.free_replica,
    )
    # Under autocast DeepSpeed holds the weights themselves in 16 bits, and steps on a float32 copy.
    old, width = now.numbers, now.numbers.compute
    numbers = Numbers(width, width, width, master=4, state=old.state * 4 / (old.master or old.weight))
    return replace(now, layout=layout, numbers=numbers, zero=stage)


def _on_nodes(now: Situation, nodes: int) -> Situation:
    before, ranks = now.layout, now.layout.ranks_per_node * nodes

    def parts(count: int) -> int:
        return ranks if count > 1 else 1

    layout = replace(
        before,
        ranks=ranks,
        parameters=parts(before.parameters),
        gradients=parts(before.gradients),
        optimizer=parts(before.optimizer),
    )
    return replace(now, layout=layout, nodes=nodes)


def _last_of_each(texts: list[str]) -> list[str]:
    """A stage that a higher one replaces is not worth mentioning."""
    stages = [text for text in texts if "strategy/zero" in text]
    return [text for text in texts if text not in stages[:-1]]

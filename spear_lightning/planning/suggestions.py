"""What would make a run fit that does not: each change by itself, and if none is enough, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile

from spear_lightning.planning.memory import MemoryPlan, plan_memory
from spear_lightning.planning.shape import Layout, Numbers, Workload
from spear_lightning.policy.flops import ModelShape

_MOST_NODES = 64


@dataclass(frozen=True)
class Situation:
    """A planned run and the available memory.

    Attributes:
        model: its shape.
        numbers: bytes of each kind of number.
        layout: what is partitioned.
        work: what goes through the model.
        nodes: number of them.
        capacity: bytes of a GPU; of a node's RAM where there is none.
        gpu: whether the devices are GPUs.
        strategy: its class name.
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
    stages = [text for text in texts if "strategy/zero" in text]
    # A stage that a higher one replaces is not worth mentioning.
    return [Suggestion(" and ".join(text for text in texts if text not in stages[:-1]), situation.needed)]


def _changes(now: Situation) -> Iterator[tuple[str, Situation]]:
    """Single changes from cheap to dear."""
    if not now.work.checkpointing:
        work = replace(now.work, checkpointing=True)
        yield "--model.policy.gradient_checkpointing true", replace(now, work=work)
    if now.work.played < now.work.sequences:
        work = replace(now.work, sequences=now.work.played, decoded=min(now.work.decoded, now.work.played))
        yield f"--data.evaluation.batch {now.work.played}", replace(now, work=work)
    least = max(1024, now.work.sequence_tokens)  # a longer row is not cut
    sizes = takewhile(lambda tokens: tokens >= least, (now.work.tokens >> halvings for halvings in count(1)))
    yield from _first_that_fits(
        (f"--data.max_tokens {size}", replace(now, work=replace(now.work, tokens=size))) for size in sizes
    )
    layout, stage = now.layout, now.layout.stage
    if layout.ranks > 1:
        for higher in range((stage or 0) + 1, 4):
            yield f"-c configs/strategy/zero{higher}.yaml", _at_stage(now, higher)
    if not stage:
        return
    if now.gpu and layout.optimizer_place == "device":
        offloaded = replace(layout, optimizer_place="host")
        yield "--trainer.strategy.init_args.offload_optimizer true", replace(now, layout=offloaded)
    if now.gpu and stage == 3 and layout.parameter_place == "device":
        offloaded = replace(layout, parameter_place="host")
        yield "--trainer.strategy.init_args.offload_parameters true", replace(now, layout=offloaded)
    doubled = takewhile(lambda nodes: nodes <= _MOST_NODES, (now.nodes << doublings for doublings in count(1)))
    yield from _first_that_fits((f"--trainer.num_nodes {nodes}", _on_nodes(now, nodes)) for nodes in doubled)


def _first_that_fits(changes: Iterable[tuple[str, Situation]]) -> list[tuple[str, Situation]]:
    """The least of several steps of one change that is enough, or the largest step if none is."""
    tried: list[tuple[str, Situation]] = []
    for change in changes:
        tried.append(change)
        if change[1].fits:
            break
    return tried[-1:]


def _at_stage(now: Situation, stage: int) -> Situation:
    """The same under another stage of ZeRO."""
    layout = replace(now.layout, stage=stage, gradient_copy=False, overlap=stage >= 2)
    # Under autocast DeepSpeed holds the weights themselves in 16 bits, and steps on a float32 copy.
    old, width = now.numbers, now.numbers.compute
    numbers = Numbers(width, width, width, master=4, state=old.state * 4 / (old.master or old.weight))
    return replace(now, layout=layout, numbers=numbers)


def _on_nodes(now: Situation, nodes: int) -> Situation:
    return replace(now, layout=replace(now.layout, ranks=now.layout.ranks_per_node * nodes), nodes=nodes)

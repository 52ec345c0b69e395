"""The formulas of memory and cost: by hand, over ranks, and against DeepSpeed's own estimators."""

from __future__ import annotations

from dataclasses import replace

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from spear_lightning.planning.memory import (
    activation_bytes,
    cache_bytes,
    cache_columns,
    layer_bytes,
    plan_memory,
    replay_bytes,
    temporary_bytes,
)
from spear_lightning.planning.shape import Layout, Numbers, Workload
from spear_lightning.policy.flops import ModelShape

# Ψ = 1000 in round numbers; the parts need not add up.
TINY = ModelShape(
    parameters=1000,
    trainable=1000,
    largest=100,
    layers=2,
    hidden=8,
    intermediate=16,
    queries=8,
    keys=4,
    heads=2,
    vocabulary=50,
)
LARGE = replace(TINY, parameters=8_000_000_000, trainable=8_000_000_000, largest=500_000_000)
FLOAT32, BF16 = Numbers(), Numbers(weight=2, compute=2, residual=2, state=4)
ZERO = Numbers(weight=2, compute=2, residual=2, master=4, state=8)
STATES = ("parameters", "gradients", "optimizer", "float32 gradients")


def states(model: ModelShape, numbers: Numbers, layout: Layout) -> dict[str, int]:
    plan = plan_memory(model, numbers, layout, Workload(tokens=1))
    return {name: plan.bytes_of(name) for name in STATES}


@pytest.mark.parametrize(
    ("numbers", "layout", "expected"),
    [
        (FLOAT32, Layout(), (4000, 4000, 8000, 0)),
        (BF16, Layout(4, 4, gradient_copy=True), (2000, 2000, 4000, 0)),
        (ZERO, Layout(4, 4, 0), (2000, 2000, 12000, 0)),
        (ZERO, Layout(4, 4, 1), (2000, 2000, 3000, 1000)),
        (ZERO, Layout(4, 4, 2), (2000, 500, 3000, 1000)),
        (ZERO, Layout(4, 4, 3), (500, 500, 3000, 1000)),
        (replace(FLOAT32, master=4), Layout(4, 4, 3), (1000, 1000, 3000, 1000)),
        (replace(ZERO, state=0), Layout(4, 4, 1), (2000, 2000, 1000, 1000)),  # plain SGD
    ],
)
def test_model_states_by_hand(numbers, layout, expected):
    assert tuple(states(TINY, numbers, layout).values()) == expected


def test_adapters_alone_have_gradients_and_state():
    adapted = replace(TINY, trainable=100)
    assert tuple(states(adapted, ZERO, Layout(2, 2, 2)).values()) == (2000, 100, 600, 200)


@pytest.mark.parametrize("nodes", [1, 4])
def test_deepspeed_says_the_same_of_model_states(nodes):
    ranks = 8 * nodes
    _, estimate = estimate_zero2_model_states_mem_needs(LARGE.parameters, 8, nodes, cpu_offload=False)
    assert sum(states(LARGE, ZERO, Layout(ranks, 8, 2)).values()) == estimate
    _, estimate, _ = estimate_zero3_model_states_mem_needs(LARGE.parameters, 0, 8, nodes, False, False)
    mine = states(LARGE, ZERO, Layout(ranks, 8, 3))
    # Its 18 bytes are those that stage 2 partitions; stage 3 has a partition of the 16-bit weights as well.
    assert sum(mine.values()) - mine["parameters"] == estimate
    _, offloaded = estimate_zero2_model_states_mem_needs(LARGE.parameters, 8, nodes, cpu_offload=True)
    plan = plan_memory(LARGE, ZERO, Layout(ranks, 8, 2, optimizer_place="host"), Workload(tokens=1))
    assert sum(p.bytes for p in plan.parts if p.name in STATES and p.place == "device") == offloaded


def test_more_ranks_never_need_more_and_a_higher_stage_holds_less():
    for stage in range(4):
        peaks = [plan_memory(LARGE, ZERO, Layout(n, 8, stage), Workload(tokens=64)).peak for n in (1, 2, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)
    held = [sum(states(LARGE, ZERO, Layout(8, 8, stage)).values()) for stage in (1, 2, 3)]
    assert held == sorted(held, reverse=True)


def test_phases_hold_what_they_need():
    work = Workload(tokens=8, sequences=2, sequence_tokens=64, prompt_tokens=64, decoded=2)
    plan = plan_memory(TINY, ZERO, Layout(2, 2, 3, bucket=10), work)
    kept = plan_memory(TINY, ZERO, Layout(2, 2, 3, bucket=10, free_replica=False), work)
    assert plan.bytes_of("generation replica") == 2000
    assert kept.total("backward") - plan.total("backward") == 2000
    assert kept.total("generation") == plan.total("generation")
    assert plan.peak == max(plan.total(phase) for phase in ("generation", "backward", "step"))
    reference = plan_memory(TINY, ZERO, Layout(2, 2, 3, bucket=10), replace(work, reference=True))
    assert reference.total("backward") - plan.total("backward") == 2000, "whole on every rank"


def test_ddp_holds_gradients_twice_unless_they_are_a_view():
    plain, view = (
        plan_memory(TINY, FLOAT32, Layout(2, 2, gradient_copy=copy), Workload(tokens=1)) for copy in (True, False)
    )
    assert plain.bytes_of("communication buckets") == 4000
    assert view.bytes_of("communication buckets") == 0


def test_offloading_moves_and_a_cpu_has_one_memory():
    layout = Layout(4, 2, 3, bucket=0, optimizer_place="host", parameter_place="disk")
    plan = plan_memory(TINY, ZERO, layout, Workload(tokens=1, replay_entries=8, sequence_tokens=10))
    places = {part.name: part.place for part in plan.parts}
    assert (places["optimizer"], places["parameters"], places["gradients"]) == ("host", "disk", "host")
    assert plan.host == 2 * (3000 + 500 + 1000 + 2000 + 2 * 10 * 8)  # of the node's two ranks, replay over all four
    shared = plan.on_cpu()
    assert shared.host == 0
    assert shared.total("step") == plan.total("step") + plan.total("step", "host")
    disk = plan_memory(TINY, ZERO, replace(layout, optimizer_place="disk"), Workload(tokens=1))
    assert disk.total("step", "disk") == 3000 + 500


def test_activations_by_hand():
    # A token of a layer: two norms of (4 + 4 + 4) · 8; queries, keys, values and output, 2 · 4 · (8 + 4); the sums of
    # 2 heads, 4 each; an MLP of 4 · 4 · 16.
    assert layer_bytes(TINY, FLOAT32, 10) == 10 * (2 * 12 * 8 + 8 * 12 + 4 * 2 + 16 * 16)
    whole = activation_bytes(TINY, FLOAT32, 10, checkpointing=False)
    assert whole == 2 * layer_bytes(TINY, FLOAT32, 10) + 10 * 12 * 8
    assert activation_bytes(TINY, FLOAT32, 10, checkpointing=True) == 2 * 10 * 4 * 8 + 10 * 12 * 8
    assert activation_bytes(TINY, BF16, 10, checkpointing=False) < 0.6 * whole
    autocast = replace(FLOAT32, compute=2, cast=2)
    assert activation_bytes(TINY, autocast, 0, checkpointing=True) == 2000


def test_the_output_head_or_a_layer_needs_most_for_a_moment():
    head = 8 * 50 * 8  # the gradient of its weights, summed and once more
    assert temporary_bytes(TINY, FLOAT32, Workload(tokens=1)) == head + 16 * 50
    assert temporary_bytes(TINY, FLOAT32, Workload(tokens=2, chunk_bytes=100)) == head + 100
    long = Workload(tokens=10_000, chunk_bytes=100)
    assert temporary_bytes(TINY, FLOAT32, long) == 10_000 * 4 * (3 * 16 + 2 * 8)
    recomputed = temporary_bytes(TINY, FLOAT32, replace(long, checkpointing=True))
    assert recomputed == temporary_bytes(TINY, FLOAT32, long) + layer_bytes(TINY, FLOAT32, 10_000)


def test_cache_and_replay():
    assert [cache_columns(64, n) for n in (1, 64, 65, 128, 129, 2560)] == [64, 64, 128, 128, 192, 2624]
    assert cache_columns(2048, 2560) == 3072
    assert cache_bytes(TINY, BF16, sequences=3, columns=64) == 2 * 2 * 4 * 2 * 3 * 64
    assert replay_bytes(10, 100) == 8_000

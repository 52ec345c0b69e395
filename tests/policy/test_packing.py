"""Rows laid end to end, with and without common beginnings: the same numbers and gradients as one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from spear_lightning.policy.packing import pack_rows
from spear_lightning.policy.policy import LoRA, Policy

ROWS = [
    [11, 12, 13, 14, 15, 16],
    [11, 12, 13, 20, 21],
    [11, 12, 13],  # begins two others, and ends there
    [11, 12, 13, 14, 15, 16],  # occurs twice
    [30, 12, 13, 14, 15, 16, 17, 18, 19],
    [11, 12, 13, 14, 22, 23, 24],
    [5],
]
COMPUTED_ONCE = 6 + 2 + 0 + 0 + 9 + 3 + 1
LAYOUTS = ("padded", "packed", "shared")


def batch(left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, ROWS)) + 2  # two columns more than needed: padding anywhere
    ids, mask = torch.zeros(len(ROWS), width, dtype=torch.long), torch.zeros(len(ROWS), width, dtype=torch.long)
    for number, row in enumerate(ROWS):
        start = width - len(row) if left else 0
        ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = 1
    return ids, mask


def alone(policy: Policy, ids, mask, temperature: float):
    """One row at a time, all logits held: the plain implementation."""
    logps, entropies = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for number, valid in enumerate(mask.bool()):
        row = ids[number, valid]
        if len(row) > 1:
            logits = policy.model(input_ids=row[None]).logits[0, :-1] / temperature
            distribution = torch.distributions.Categorical(logits=logits)
            columns = valid.nonzero()[1:, 0]
            logps = logps.index_put((torch.tensor(number), columns), distribution.log_prob(row[1:]))
            entropies = entropies.index_put((torch.tensor(number), columns), distribution.entropy())
    return logps, entropies


def gradients(policy: Policy, stats, loss_mask) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    weights = torch.linspace(-1, 2, loss_mask.numel()).view(loss_mask.shape)  # every token its own
    ((stats[0] * weights + stats[1] * weights.flip(0)) * loss_mask).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_equal_those_of_one_row_at_a_time(tiny_policy, kind, left, layout):
    policy = tiny_policy(kind, layout=layout, chunk_bytes=5_000)
    ids, mask = batch(left)
    loss_mask = mask * (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6)
    loss_mask[torch.arange(len(ROWS)), mask.argmax(1)] = 0  # nothing predicts a first token
    stats = policy(ids, mask, 0.7, loss_mask=loss_mask)
    plain = tuple(x * loss_mask for x in alone(policy, ids, mask, 0.7))
    torch.testing.assert_close(tuple(stats), plain, rtol=1e-5, atol=1e-5)
    mine, expected = gradients(policy, stats, loss_mask), gradients(policy, plain, loss_mask)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0.1
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(("layout", "computed"), [("packed", sum(map(len, ROWS))), ("shared", COMPUTED_ONCE)])
def test_no_padding_and_no_common_beginning_is_computed(tiny_policy, layout, computed):
    policy = tiny_policy(layout=layout)
    seen = []
    policy.causal_lm.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    policy(*batch())
    assert seen == [(1, computed, 32)]


def test_each_row_finds_its_tokens_and_positions():
    ids, mask = batch()
    packed = pack_rows(ids, mask.bool(), share=True)
    valid = mask.bool()
    assert torch.equal(packed.input_ids[0][packed.places][valid], ids[valid])
    columns = torch.arange(ids.shape[1]).expand(ids.shape)
    assert torch.equal(packed.position_ids[0][packed.places][valid], columns[valid])
    assert sum(packed.segments.queries) == COMPUTED_ONCE
    starts = np.cumsum([0, *packed.segments.keys])
    for number, (queries, keys) in enumerate(zip(packed.segments.queries, packed.segments.keys, strict=True)):
        path = packed.segments.index[starts[number] : starts[number] + keys]
        assert packed.position_ids[0][path].tolist() == list(range(keys)), "a row's keys are its tokens in order"
        assert path[-queries:].tolist() == list(range(path[-1] - queries + 1, path[-1] + 1)), "its own come last"


def test_masks_are_made_once_and_by_who_needs_them():
    ids, mask = batch()
    segments = pack_rows(ids, mask.bool(), share=True).segments
    assert segments._masks == []
    assert segments.masks is segments.masks
    assert [made is None for made in segments.masks] == [
        q == k for q, k in zip(segments.queries, segments.keys, strict=True)
    ]
    for queries, keys, made in zip(segments.queries, segments.keys, segments.masks, strict=True):
        if made is not None:
            seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
            assert torch.equal(made == 0, seen)
            assert bool((made[~seen] == -torch.inf).all())


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_with_checkpointing_and_adapters(tiny_policy, layout):
    settings = {"lora": LoRA(rank=4), "seed": 3}
    policies = [tiny_policy(**settings), tiny_policy(**settings, layout=layout, gradient_checkpointing=True)]
    ids, mask = batch()
    found = []
    for policy in policies:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).view(parameter.shape))
        found.append(gradients(policy, policy(ids, mask), mask * (torch.arange(ids.shape[1]) > 0)))
    assert all("lora" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_plain(tiny_policy):
    changes = {"model_type": "granite", "logits_scaling": 8.0}
    policy = tiny_policy("llama", config=changes, layout="shared")
    assert not policy.chunked
    ids, mask = batch()
    expected = tiny_policy("llama", config=changes)(ids, mask, 0.8)
    torch.testing.assert_close(tuple(policy(ids, mask, 0.8)), tuple(expected), rtol=1e-5, atol=1e-5)


def test_adapters_make_no_gradient_of_what_is_frozen(tiny_policy):
    """Nothing of a frozen matrix's shape is made in the backward pass, the output head's least of all."""
    policy = tiny_policy(lora=LoRA(rank=3), config={"vocab_size": 97, "intermediate_size": 71})
    frozen = {tuple(p.shape) for p in policy.parameters() if not p.requires_grad and p.dim() == 2}
    assert (97, 32) in frozen
    made = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            # Views (a transposed weight) are no gradients.
            if isinstance(result, torch.Tensor) and not function.is_view:
                made.add(tuple(result.shape))
            return result

    ids, mask = batch()
    stats = policy(ids, mask)
    with Watch():
        (stats.logps.sum() + stats.entropies.sum()).backward()
    assert made
    assert not made & (frozen | {shape[::-1] for shape in frozen})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "dense"}, r"Policy\.layout must be one of padded, packed, shared, not dense"),
        ({"layout": "packed", "attention": "eager"}, r"policy\.layout: .*sdpa.*not eager"),
        ({"layout": "shared", "lora": LoRA(dropout=0.1)}, r"policy\.lora\.dropout"),
        ({"layout": "packed", "compile": True}, r"policy\.compile"),
        ({"fused_kernels": True}, r"policy\.fused_kernels needs"),
        (
            {"layout": "packed", "config": {"model_type": "mistral", "sliding_window": 4}},
            r"policy\.layout: Mistral.*sliding_attention.*padded",
        ),
        (
            {
                "layout": "packed",
                "replace": {
                    "model_type": "falcon",
                    "hidden_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
            },
            r"policy\.layout: Falcon.*packed rows",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_what_cannot_be_had_is_named(tiny_policy, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy(**settings)


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradients_and_leave_the_policy_as_it_was(tiny_policy):
    plain, compiled = tiny_policy("qwen2"), tiny_policy("qwen2", compile=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    ids, mask = batch()
    loss_mask = mask * (torch.arange(ids.shape[1]) > 0)
    found = [gradients(policy, policy(ids, mask, 0.7, loss_mask=loss_mask), loss_mask) for policy in (plain, compiled)]
    torch.testing.assert_close(
        found[1], found[0], rtol=1e-5, atol=1e-5 * max(float(g.abs().max()) for g in found[0].values())
    )
    assert isinstance(compiled.causal_lm.model.layers[0], nn.Module)
    last = mask.sum(1) - 1
    torch.testing.assert_close(compiled.next_token_logits(ids, last), plain.next_token_logits(ids, last))

"""The same numbers on a GPU: the engine against the policy, the layouts against each other, the GPU against the CPU.

Run by ``benchmarks/gpu_check.py``; prints JSON. Rows are ragged and share beginnings, weights are random and wide, so
that distributions are far from uniform and a wrong position or mask shows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from measuring.our_update import MODEL, TOKENIZER
from spear_lightning.engines.base import Completion, Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.policy import attention as packed_attention
from spear_lightning.policy.logprobs import token_logprobs_and_entropy
from spear_lightning.policy.packing import LAYOUTS
from spear_lightning.policy.policy import Policy

WIDE = {**MODEL, "initializer_range": 0.06}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def policy_of(layout: str = "padded", dtype: torch.dtype = torch.float32, device: str = "cuda") -> Policy:
    """The policy in its training precision: buffers stay in float32."""
    return Policy(config=dict(WIDE), tokenizer=TOKENIZER, layout=layout).to(device=device, dtype=dtype)  # type: ignore[arg-type]


def head() -> dict[str, float]:
    """Relative errors of log-probabilities, entropies and gradients of the chunked head, against float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 256, generator=generator)
    weight = torch.randn(30_000, 256, generator=generator) * 0.1
    targets = torch.randint(30_000, (700,), generator=generator)
    found = {}
    for name, dtype in DTYPES.items():
        inputs = [x.to("cuda", dtype) for x in (hidden, weight)]
        pairs = []
        for kind in (dtype, torch.float64):
            leaves = [x.to(kind).detach().clone().requires_grad_() for x in inputs]
            stats = token_logprobs_and_entropy(*leaves, targets.cuda(), temperature=0.7, chunk_size=300)
            ramp = torch.linspace(-1, 2, 700, device="cuda").to(stats[0].dtype)
            (stats[0] * ramp + stats[1] * ramp.flip(0)).sum().backward()
            pairs.append([*stats, *(x.grad for x in leaves)])
        for label, mine, exact in zip(("logps", "entropies", "for hidden", "for weight"), *pairs, strict=True):
            found[f"{name}, {label}"] = _error([mine], [exact])
    return found


def engine() -> dict[str, Any]:
    """Differences between the engine's log-probabilities and the policy's own, over episodes of several turns."""
    found: dict[str, Any] = {}
    drawn = {}
    for name, dtype in DTYPES.items():
        for layout in LAYOUTS:
            policy = policy_of(layout, dtype)
            answers = _episodes(policy, HuggingFaceEngine())
            found[f"{name}, {layout}"] = _mismatch(policy, answers)
            drawn[name, layout] = answers
    again = _episodes(policy_of("padded"), HuggingFaceEngine(cache_gib=0.02, max_batch=5))
    found["float32, small cache and batch: equal tokens"] = _same(again, drawn["float32", "padded"])
    on_cpu = _episodes(policy_of("padded", device="cpu"), HuggingFaceEngine(), sessions=6)
    found["float32, CPU and GPU: equal tokens"] = _same(on_cpu, drawn["float32", "padded"])
    return found


def layouts() -> dict[str, Any]:
    """Values and gradients of each layout and precision, against padded rows in float32 with the same weights."""
    ids, mask = _rows()
    loss_mask = mask * (torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.6).cuda()
    loss_mask[:, 0] = 0
    calls = []
    kernel = packed_attention.varlen_attn
    if kernel is not None:
        packed_attention.varlen_attn = lambda *a, **k: calls.append(1) or kernel(*a, **k)  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        exact: Any = None
        rounded = policy_of("padded", dtype).state_dict()
        for precision, layout in (("float32", "padded"), *((name, layout) for layout in LAYOUTS)):
            policy = policy_of(layout, DTYPES[precision])
            policy.load_state_dict(rounded)
            calls.clear()
            stats = policy(ids, mask, 0.7, loss_mask=loss_mask)
            ramp = torch.linspace(-1, 2, loss_mask.numel(), device="cuda").view(loss_mask.shape)
            ((stats.logps * ramp + stats.entropies * ramp.flip(0)) * loss_mask).sum().backward()
            gradients = [p.grad for p in policy.parameters()]
            logps = stats.logps.detach()
            if exact is None:
                exact = logps, gradients
                continue
            chosen = loss_mask.bool()
            found[f"{name}, {layout}"] = {
                "largest difference of a log-probability": float((logps - exact[0])[chosen].abs().max()),
                "mean": float((logps - exact[0])[chosen].abs().mean()),
                "gradients, relative": _error(gradients, exact[1]),
                "calls of flash attention": len(calls),
            }
    packed_attention.varlen_attn = kernel
    return found


def _rows() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(6):
        prefix = rng.integers(5, 2000, rng.integers(20, 300))
        rows += [np.concatenate([prefix, rng.integers(5, 2000, rng.integers(0, 200))]) for _ in range(6)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row), 1
    return ids.cuda(), mask.cuda()


def _episodes(
    policy: Policy, engine: HuggingFaceEngine, sessions: int = 24, turns: int = 4
) -> list[tuple[Request, Completion]]:
    """Ragged transcripts that grow; what observations say does not depend on what was drawn."""
    rng = [np.random.default_rng([7, number]) for number in range(sessions)]
    contexts = [
        np.random.default_rng(number % 5).integers(5, 2000, 10 + 40 * (number % 5)) for number in range(sessions)
    ]
    answers = []
    engine.sync(policy, 0)
    for turn in range(turns):
        sampling = Sampling(max_new_tokens=8, temperature=0.9, stop_ids=(3, 4))
        asked = [
            Request(str(number), context.astype(np.int32), sampling, 1000 * turn + number)
            for number, context in enumerate(contexts)
        ]
        given = engine.generate(asked)
        answers += zip(asked, given, strict=True)
        contexts = [
            np.concatenate([context, one.ids, rng[number].integers(5, 2000, 12 + number)])
            for number, (context, one) in enumerate(zip(contexts, given, strict=True))
        ]
    engine.close()
    return answers


def _mismatch(policy: Policy, answers: list[tuple[Request, Completion]]) -> dict[str, float]:
    rows = [np.concatenate([asked.prompt_ids, given.ids]) for asked, given in answers]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    loss_mask = torch.zeros_like(ids)
    for number, (row, (asked, _)) in enumerate(zip(rows, answers, strict=True)):
        ids[number, : len(row)], mask[number, : len(row)] = torch.from_numpy(row), 1
        loss_mask[number, len(asked.prompt_ids) : len(row)] = 1
    with torch.no_grad():
        stats = policy(ids.cuda(), mask.cuda(), 0.9, loss_mask=loss_mask.cuda())
    chosen = loss_mask.bool()
    logps = torch.from_numpy(np.concatenate([given.logps for _, given in answers]))
    entropies = torch.from_numpy(np.concatenate([given.entropies for _, given in answers]))
    differences = (stats.logps.cpu()[chosen] - logps).abs()
    return {
        "tokens": len(logps),
        "log-probability, largest": float(differences.max()),
        "mean": float(differences.mean()),
        "entropy, largest": float((stats.entropies.cpu()[chosen] - entropies).abs().max()),
        "log-probabilities themselves, mean": float(logps.mean()),
    }


def _same(ones: list[tuple[Request, Completion]], others: list[tuple[Request, Completion]]) -> float:
    """Share of responses to the same prompts that are equal, token by token."""
    by_prompt = {(a.session, a.seed): (a.prompt_ids.tolist(), given.ids.tolist()) for a, given in others}
    equal = [by_prompt[a.session, a.seed] == (a.prompt_ids.tolist(), given.ids.tolist()) for a, given in ones]
    return sum(equal) / len(equal)


def _error(mine: Iterable[Any], exact: Iterable[Any]) -> float:
    """‖mine − exact‖ / ‖exact‖ over all tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(mine, exact, strict=True)]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) ** 0.5 / sum((b**2).sum() for _, b in pairs) ** 0.5)


if __name__ == "__main__":
    print(json.dumps({"head": head, "engine": engine, "layouts": layouts}[sys.argv[1]]()))

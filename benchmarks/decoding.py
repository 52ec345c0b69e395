"""What a decoding step of ``HuggingFaceEngine`` consists of, on this machine: 32 conversations, one token each.

    python benchmarks/decoding.py --out benchmarks/decoding.json   # a minute

Measured in turns: the step; its attention, its matrix products, and reading its keys and values once, each alone; and
the step of one row without a past, which computes next to nothing: what it costs to call the operations.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring.playing import MODELS, make_policy
from measuring.ratios import machine, spread, timed

from spear_lightning.engines.huggingface.forward import CachedForward, generation_mode
from spear_lightning.engines.huggingface.kv_cache import KeyValueRows
from spear_lightning.engines.huggingface.ops import Attention, linear
from spear_lightning.policy.policy import Policy

ROWS = 32


def step(forward: CachedForward, rows: int, columns: int) -> Callable[[], Any]:
    """One token for each row."""
    cache = KeyValueRows()
    cache.reserve(rows, columns + 64)
    ids, lasts = torch.full((rows, 1), 5), torch.zeros(rows, dtype=torch.long)
    places = torch.full((rows, 1), columns - 1)
    return lambda: forward.feed(cache, ids, lasts, slice(0, rows), places, places, columns)


def parts(policy: Policy, columns: int) -> dict[str, Callable[[], Any]]:
    """The step and what it is made of, by name."""
    config = policy.causal_lm.config
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    layers = [torch.randn(2, ROWS, heads, columns + 64, size)[:, :, :, :columns] for _ in policy.causal_lm.model.layers]
    query, positions = torch.randn(ROWS, 1, heads * groups, size), torch.full((ROWS, 1), columns - 1)
    attend = Attention(torch.zeros(ROWS, 1, 1, columns), positions, heads, size**-0.5)
    weights = [module.weight for module in policy.causal_lm.modules() if isinstance(module, torch.nn.Linear)]
    rows = {width: torch.randn(ROWS, width) for width in {weight.shape[1] for weight in weights}}
    forward = CachedForward(policy)
    return {
        "step": step(forward, ROWS, columns),
        "attention": lambda: [attend(query, keys, values) for keys, values in layers],
        "matrix products": lambda: [linear(rows[weight.shape[1]], weight) for weight in weights],
        "reading keys and values": lambda: [layer.sum() for layer in layers],
        "calling": step(forward, 1, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="1 M")
    parser.add_argument("--columns", type=int, nargs="+", default=[150, 450, 750], help="tokens before")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    policy = make_policy(arguments.model)
    results: dict[str, Any] = {"machine": machine(), "model": arguments.model, "rows": ROWS}
    with generation_mode(policy):
        for columns in arguments.columns:
            times = timed(parts(policy, columns), arguments.repeats, warm=10)
            found = {name: spread([1000 * seconds for seconds in taken.seconds]) for name, taken in times.items()}
            results[f"{columns} columns, milliseconds"] = found
            print(columns, "columns:", {name: round(figures["median"], 2) for name, figures in found.items()})
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The operations of ``spear_lightning/engines/huggingface/ops.py`` against the usual forms, in turns on one CPU.

    python benchmarks/operations.py --out benchmarks/operations.json   # a minute

Ratios are the usual form's time over ours: median, least and most of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from measuring.ratios import compare, machine

from spear_lightning.engines.huggingface.ops import Attention, linear, rms_norm

Side = Callable[[], Any]


def products(rows: int, inputs: int, outputs: int) -> tuple[Side, Side]:
    """A layer of weights and a few rows."""
    hidden, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return lambda: linear(hidden, weight), lambda: F.linear(hidden, weight)


def norms(rows: int, width: int) -> tuple[Side, Side]:
    """Root mean squares of rows."""
    hidden, weight, epsilon = torch.randn(rows, width), torch.randn(width), torch.tensor(1e-6)
    return lambda: rms_norm(hidden, weight, epsilon), lambda: F.rms_norm(hidden, (width,), weight, 1e-6)


def attention(rows: int, heads: int, groups: int, size: int, tokens: int, columns: int) -> tuple[Side, Side]:
    """New tokens that attend to a cache of several layers, which come one after the other."""
    query, scale = torch.randn(rows, tokens, heads * groups, size), size**-0.5
    layers = [torch.randn(2, rows, heads, columns, size) for _ in range(4)]
    positions = torch.arange(columns - tokens, columns).expand(rows, tokens)
    hidden = torch.arange(columns) > positions[:, None, :, None]
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)
    attend = Attention(mask, positions, heads, scale)

    def usual(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if tokens == 1:
            together = query.reshape(rows, heads, groups, size)
            return F.scaled_dot_product_attention(together, keys, values, attn_mask=mask, scale=scale)
        grouped = {"scale": scale, "enable_gqa": groups > 1}
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask, **grouped)

    return (
        lambda: [attend(query, keys, values) for keys, values in layers],
        lambda: [usual(keys, values) for keys, values in layers],
    )


def pass_over_prompts(rows: int) -> tuple[Side, Side]:
    """A feed-forward layer over prompts of 256 tokens: eight rows at a time, and all at once."""
    hidden = torch.randn(rows, 256, 128)
    gate, up, down = torch.randn(384, 128), torch.randn(384, 128), torch.randn(128, 384)

    def layer(part: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(part, gate)).mul_(F.linear(part, up)), down)

    return lambda: [layer(part) for part in torch.split(hidden, 8)], lambda: layer(hidden)


CASES: dict[str, tuple[int, tuple[Side, Side]]] = {
    "product, 32 rows, 128 to 384": (300, products(32, 128, 384)),
    "product, 64 rows, 512 to 1408": (50, products(64, 512, 1408)),
    "product, 32 rows, 512 to 10240": (5, products(32, 512, 10240)),
    "product, 4 rows, 512 to 10240": (10, products(4, 512, 10240)),
    "norm, 32 rows of 128": (500, norms(32, 128)),
    "norm, 64 rows of 512": (500, norms(64, 512)),
    "attention, 1 token to 256, 1 M": (20, attention(32, 2, 2, 32, 1, 256)),
    "attention, 1 token to 768, 1 M": (20, attention(32, 2, 2, 32, 1, 768)),
    "attention, 1 token to 512, 28 M": (10, attention(32, 2, 4, 64, 1, 512)),
    "attention, 1024 tokens to 1024, 28 M": (2, attention(2, 2, 4, 64, 1024, 1024)),
    "prompts, 128 rows of 256 tokens": (1, pass_over_prompts(128)),
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measured runs of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"machine": machine()}
    for name, (times, sides) in CASES.items():
        repeated = {
            side: lambda call=call, times=times: [call() for _ in range(times)]
            for side, call in zip(("ours", "usual"), sides, strict=True)
        }
        results[name] = compare(repeated, arguments.repeats, work=times, unit="calls")
        ratio = results[name]["ratios"]["usual"]
        print(f"{name:36} {ratio['median']:5.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

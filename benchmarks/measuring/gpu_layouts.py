"""Seconds and memory of an update on a GPU, by layout; run by ``benchmarks/gpu_check.py``, prints JSON.

python gpu_layouts.py MODEL PRECISION ROUNDS
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import warnings
from typing import Any

import torch

from measuring.episodes import play
from measuring.interleaved import Costs, interleaved, ratio, spread
from measuring.our_update import MODEL, OurUpdate
from spear_lightning.policy.flops import linear_weights, model_flops, shape_of
from spear_lightning.policy.packing import LAYOUTS

MODELS: dict[str, dict[str, Any]] = {
    "28M": MODEL,
    "0.5B": {
        **MODEL,
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
"""``0.5B`` has the sizes of Qwen2.5-0.5B."""


def measure(model: str, precision: str, rounds: int) -> dict[str, Any]:
    """Seconds of an update and peak memory, layouts in turn."""
    rows = play(8, 8).rows
    tokens = [len(row) for row in rows.values()]
    predicted = sum(int(row.mask.sum()) for row in rows.values())
    updates = {
        layout: OurUpdate(rows, layout, 16_384, dict(MODELS[model]), accelerator="gpu", precision=precision)
        for layout in LAYOUTS
    }
    causal = updates["padded"].policy.model
    flops = model_flops(shape_of(causal), linear_weights(causal), sum(tokens), sum(n * n for n in tokens), predicted)
    costs = interleaved(updates, rounds, warm_up=2)
    return {
        "parameters": sum(p.numel() for p in causal.parameters()),
        "rows": len(rows),
        "tokens": sum(tokens),
        "predicted": predicted,
        "useful_TFLOP": flops / 1e12,
        "layouts": {name: _figures(costs, name, update, flops) for name, update in updates.items()},
    }


def _figures(costs: dict[str, Costs], name: str, update: OurUpdate, flops: float) -> dict[str, Any]:
    gc.collect()
    standing = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    update()
    wall = spread(costs[name].wall)
    return {
        "computed": update.computed,
        "micro_batches": len(update.minibatch.micro_batches["fresh"]),
        "seconds": wall,
        "times_as_fast_as_padded": ratio(costs["padded"], costs[name])["wall"],
        "useful_TFLOP_per_second": flops / 1e12 / wall["median"],
        "GiB_of_a_step": (torch.cuda.max_memory_allocated() - standing) / 2**30,
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))

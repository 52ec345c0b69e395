"""Peak memory of log-probabilities and entropies over a large vocabulary: one way of computing them, in this process.

python benchmarks/measuring/head_memory.py chunked|materialised TOKENS VOCABULARY WIDTH
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch

from spear_lightning.policy.logprobs import stats_of_logits, token_logprobs_and_entropy


def main(way: str, tokens: int, vocabulary: int, width: int) -> None:
    """Forward and backward pass; prints bytes above what hidden states, weights and their gradients take.

    Args:
        way: ``chunked`` (ours) or ``materialised`` (log-softmax of all logits).
        tokens: with a gradient.
        vocabulary: entries.
        width: of the hidden states.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.process_time()
    if way == "chunked":
        logps, entropies = token_logprobs_and_entropy(hidden, weight, targets)
    else:
        logps, entropies = stats_of_logits(hidden @ weight.T, targets)
    (logps.sum() - 0.01 * entropies.sum()).backward()
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checksum = float(weight.grad.norm())
    print(json.dumps({"bytes": peak - before, "cpu_seconds": seconds, "gradient_norm": checksum}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

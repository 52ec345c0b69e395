"""Memory and cost, measured against the formulas of ``spear plan``: bytes and operations, not time.

    python benchmarks/memory.py

Each case is real training of a 31 M parameter model in processes of its own: two ranks under DDP and ZeRO-1, 2 and 3,
or one. Bytes of every part are read off the tensors of each rank, the peak off PyTorch's allocator, messages and
operations off the dispatcher. A line is printed for each case; the exit status is 1 if a measured figure is more than
15 % away from its formula. Results go to ``benchmarks/results/memory``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from comparison.provenance import provenance
from measuring.costs import checkpoint_bytes, replica_messages, update_flops, update_messages
from measuring.training import TOKENIZER, Case, make_optimizer, run

from spear_lightning.planning.inputs import numbers_of
from spear_lightning.planning.layouts import layout_of
from spear_lightning.planning.memory import cache_bytes, cache_columns, plan_memory
from spear_lightning.planning.shape import Workload
from spear_lightning.policy.flops import linear_weights, shape_of
from spear_lightning.policy.loading import fresh_model, load_tokenizer
from spear_lightning.policy.lora import LoRA, with_adapters
from spear_lightning.utils.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
TOLERANCE = 0.15
_LIVE = 5_000_000  # a layer fits, the model does not: as with large models and DeepSpeed's default of a billion

CASES = [
    Case("single", "single", 1),
    Case("single, checkpointing", "single", 1, gradient_checkpointing=True),
    Case("single, bf16-true", "single", 1, "bf16-true"),
    Case("single, bf16-mixed", "single", 1, "bf16-mixed"),
    Case("single, LoRA", "single", 1, lora=8),
    Case("single, rows of 512, eager attention", "single", 1, row_tokens=512, micro_rows=1, attention="eager"),
    Case("ddp", "ddp"),
    Case("zero-1", "zero-1"),
    Case("zero-2", "zero-2"),
    Case("zero-3", "zero-3", live=_LIVE),
    Case("zero-1, bf16-true", "zero-1", precision="bf16-true"),
    Case("zero-2, bf16-true", "zero-2", precision="bf16-true"),
    Case("zero-3, bf16-true", "zero-3", precision="bf16-true", live=_LIVE),
    Case("zero-3, bf16-mixed", "zero-3", precision="bf16-mixed", live=_LIVE),
    Case("zero-2, checkpointing", "zero-2", gradient_checkpointing=True),
    Case("zero-3, checkpointing", "zero-3", gradient_checkpointing=True, live=_LIVE),
]


@dataclass(frozen=True)
class Figure:
    """One quantity of one case.

    Attributes:
        name: of the quantity.
        measured: the largest of all ranks.
        planned: by the formula.
    """

    name: str
    measured: float
    planned: float

    @property
    def ratio(self) -> float:
        """Measured over planned."""
        return self.measured / self.planned

    @property
    def agrees(self) -> bool:
        """Whether the two are within the tolerance."""
        return abs(self.ratio - 1) <= TOLERANCE


def planned(case: Case) -> dict[str, float]:
    """What the formulas say of a case."""
    tokenizer = load_tokenizer(TOKENIZER, "tokenizer")
    with torch.device("meta"):
        model: Any = fresh_model(case.model, tokenizer, "model", dtype=torch.float32, attention="sdpa", seed=0)
        if case.lora:
            model = with_adapters(model, LoRA(rank=case.lora), 0)
    shape, strategy = shape_of(model), case.make_strategy()
    numbers = numbers_of(case.precision, "float32", strategy, make_optimizer)
    layout = layout_of(strategy, case.ranks, case.ranks)
    tokens = case.row_tokens * case.micro_rows
    work = Workload(tokens, case.gradient_checkpointing, case.chunk_bytes)
    plan = plan_memory(shape, numbers, layout, work)
    flops = update_flops(shape, linear_weights(model), tokens, case.row_tokens, case.gradient_checkpointing)
    if case.attention != "eager":  # the counter knows no fused attention on CPUs
        flops = update_flops(shape, linear_weights(model), tokens, 0, case.gradient_checkpointing)
    figures = {
        "parameters": plan.bytes_of("parameters"),
        "gradients": plan.bytes_of("gradients"),
        "optimizer": plan.bytes_of("optimizer"),
        "communication buckets": 0 if layout.stage == 2 else plan.bytes_of("communication buckets"),
        "activations": plan.bytes_of("activations"),
        "peak of an update": max(plan.total("backward"), plan.total("step")),
        "generation replica": plan.bytes_of("generation replica"),
        "generation cache": cache_bytes(shape, numbers, 8, cache_columns(64, 127)),
        "messages of an update": update_messages(shape, numbers, layout, case.micro_batches),
        "operations of an update": case.micro_batches * flops,
        "messages of the replica": replica_messages(shape, numbers, layout),
        "checkpoint": checkpoint_bytes(shape, numbers, layout),
    }
    if case.attention == "eager":  # the formulas are about fused attention, which keeps no scores
        del figures["activations"], figures["peak of an update"]
    return figures


def measure(case: Case) -> list[Figure]:
    """Run a case and compare it with the formulas.

    Args:
        case: what is run.

    Raises:
        RuntimeError: a process failed; the message ends with its last lines.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case.json").write_text(json.dumps(asdict(case)), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), "--run", str(folder)]
        python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=900)
        if done.returncode:
            raise RuntimeError(f"{case.name} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        ranks = [json.loads((folder / f"rank-{k}.json").read_text(encoding="utf-8")) for k in range(case.ranks)]
    found = {key: max(rank["bytes"].get(key, 0) for rank in ranks) for key in ranks[0]["bytes"]}
    found["messages of an update"] = max(sum(rank["messages"].values()) for rank in ranks)
    return [Figure(key, found[key], value) for key, value in planned(case).items() if value]


def markdown(results: dict[str, list[Figure]], machine: dict[str, Any]) -> str:
    """Measured over planned, a line for each case."""
    names = [figure.name for figure in max(results.values(), key=len)]
    names = list(dict.fromkeys([*names, *(f.name for figures in results.values() for f in figures)]))
    lines = [
        "# Measured over planned",
        "",
        f"Bytes and operations, not time, of a model of 31 M parameters; {machine['cpu']}, no GPU. Of each case the "
        "largest of all ranks; in brackets what was measured, in MB (operations: GFLOP). – is what a case has not.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" + "|---:" * len(names) + "|",
    ]
    for case, figures in results.items():
        by_name = {figure.name: figure for figure in figures}
        cells = [_cell(by_name.get(name)) for name in names]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += ["", "| quantity | cases | lowest ratio | highest ratio |", "|---|---:|---:|---:|"]
    for name in names:
        ratios = [figure.ratio for figures in results.values() for figure in figures if figure.name == name]
        lines.append(f"| {name} | {len(ratios)} | {min(ratios):.2f} | {max(ratios):.2f} |")
    return "\n".join(lines) + "\n"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    amount = figure.measured / (1e9 if figure.name.startswith("operations") else 1e6)
    ratio = f"{figure.ratio:.2f}"
    return f"{ratio if figure.agrees else f'**{ratio}**'} ({amount:.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases; the exit status is 0 if every figure agrees with its formula.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory", help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases, by name")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # one rank of a case
    given = parser.parse_args(arguments)
    if given.run is not None:
        run(Case(**json.loads((given.run / "case.json").read_text(encoding="utf-8"))), given.run)
        return 0
    cases = [replace(case, model=MODEL) for case in CASES if given.only is None or case.name in given.only]
    if not cases:
        parser.error(f"--only: the cases are {', '.join(case.name for case in CASES)}")
    made = provenance(1, ROOT)
    made["versions"]["deepspeed"] = version("deepspeed")
    results: dict[str, list[Figure]] = {}
    for number, case in enumerate(cases, 1):
        results[case.name] = measure(case)
        wrong = ", ".join(f"{figure.name} {figure.ratio:.2f}" for figure in results[case.name] if not figure.agrees)
        _report(f"{number}/{len(cases)} {case.name}: " + (f"NOT within 15 %: {wrong}" if wrong else "all within 15 %"))
        record = {
            **made,
            "model": MODEL,
            "cases": [
                {**asdict(done), "figures": [{**asdict(f), "ratio": f.ratio} for f in results[done.name]]}
                for done in cases[:number]
            ],
        }
        write_atomically(given.output / "memory.json", json.dumps(record, indent=1) + "\n")
        write_atomically(given.output / "memory.md", markdown(results, made["machine"]))
    return 0 if all(figure.agrees for figures in results.values() for figure in figures) else 1


def _report(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""How fast training is, against the alternatives, in one run on this machine.

    python benchmarks/training.py --out benchmarks/results/training.json

Contenders take turns, and every ratio is one of the same round; printed are medians and extremes. Parts (``--only``):

* ``update``: one optimizer step on ALFWorld episodes, our three layouts and TRL's GRPO loss (how to install TRL: the
  head of ``benchmarks/measuring/trl_update.py``; without it the part is ours alone and says so);
* ``matmul``: what share of a step its matrix products alone would take;
* ``stepwise``: a step on one prompt a turn, padded, packed, and with common beginnings computed once;
* ``memory``: of log-probabilities and entropies over 151 936 entries, against all logits;
* ``iteration``: SPEAR against Dr.BoT on the same episodes.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison.provenance import provenance
from measuring import iterations, trl_update
from measuring.episodes import Played, play
from measuring.interleaved import Costs, interleaved, ratio, spread
from measuring.matmuls import MatmulRecorder
from measuring.our_update import MODEL, QUICK, TOKENIZER, OurUpdate

from spear_lightning.data.samples import Sample
from spear_lightning.policy.loading import load_tokenizer
from spear_lightning.policy.packing import LAYOUTS, common_length, sorted_for_sharing
from spear_lightning.utils.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        rounds: of each part.
        model: that is updated.
        tasks: games of a rollout; 8 episodes each.
        max_tokens: ``data.max_tokens``.
        prompts: rows of the stepwise batch.
        head: tokens, vocabulary and width of the output head whose memory is measured.
        iterations: of each run of the last part; the first 3 do not count.
        changes: configuration of that part.
    """

    rounds: int = 5
    model: Mapping[str, Any] = field(default_factory=lambda: MODEL)
    tasks: int = 4
    max_tokens: int = 2048
    prompts: int = 48
    head: tuple[int, int, int] = (4096, 151936, 896)
    iterations: int = 10
    changes: Mapping[str, Any] = field(default_factory=dict)


SMALL = Size(
    rounds=2,
    model=QUICK,
    tasks=2,
    prompts=16,
    head=(512, 20000, 64),
    iterations=5,
    changes={"data.rollouts.tasks": 2, "data.environment.train": 16, "data.environment.validation": 8},
)


def update(size: Size, played: Played) -> dict[str, Any]:
    """Seconds of one optimizer step, by contender."""
    rows = dict(list(played.rows.items())[: len(played.rows) // 8 * 8])
    model = dict(size.model)
    contenders: dict[str, Any] = {layout: OurUpdate(rows, layout, size.max_tokens, model) for layout in LAYOUTS}
    result: dict[str, Any] = {}
    if trl_update.installed():
        tokenizer = load_tokenizer(TOKENIZER, "tokenizer")
        contenders["TRL"] = trl_update.TRLUpdate(list(rows.values()), tokenizer, model)
    else:
        print(f"update: {trl_update.MISSING}", flush=True)
        result["skipped"] = trl_update.MISSING
    tokens = sum(map(len, rows.values()))
    costs = interleaved(contenders, size.rounds)
    return result | {
        "rows": len(rows),
        "tokens": tokens,
        "computed": {name: contender.computed for name, contender in contenders.items()},
        **_against(costs, "TRL" if "TRL" in contenders else "padded", tokens),
    }


def matmul(size: Size, played: Played) -> dict[str, Any]:
    """Share of a step that its matrix products alone would take, for each layout."""
    result: dict[str, Any] = {}
    for layout in LAYOUTS:
        step = OurUpdate(played.rows, layout, size.max_tokens, dict(size.model))
        with MatmulRecorder() as recorder:
            step()
        costs = Costs()
        plain = []
        for _ in range(size.rounds):
            costs.wall += interleaved({"step": step}, 1, 0)["step"].wall
            plain.append(recorder.plain_seconds())
        shares = [alone / whole for alone, whole in zip(plain, costs.wall, strict=True)]
        result[layout] = {
            "share": spread(shares),
            "GFLOP": recorder.operations / 1e9,
            "update_GFLOP_per_second": recorder.operations / 1e9 / statistics.median(costs.wall),
            "plain_GFLOP_per_second": recorder.operations / 1e9 / statistics.median(plain),
        }
        print(f"matmul, {layout}: {_text(result[layout]['share'])} of a step", flush=True)
    return result


def stepwise(size: Size, played: Played) -> dict[str, Any]:
    """A step on one prompt a turn: a minibatch, drawn from the iteration as rows are dealt."""
    everything = list(played.stepwise.values())
    chosen = random.Random(0).sample(everything, min(size.prompts, len(everything)))
    rows = {str(number): _row(*pair) for number, pair in enumerate(chosen)}
    shares = {
        "of the whole iteration": _own_share([np.concatenate(pair) for pair in everything]),
        "of a quarter, as dealt": _own_share(
            [np.concatenate(pair) for pair in random.Random(1).sample(everything, len(everything) // 4)]
        ),
        "of this step": _own_share([row.ids for row in rows.values()]),
    }
    contenders: dict[str, Any] = {
        name: OurUpdate(rows, name, 4 * size.max_tokens, dict(size.model)) for name in LAYOUTS
    }
    tokens = sum(map(len, rows.values()))
    costs = interleaved(contenders, size.rounds)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "share of tokens that are not a common beginning": shares,
        "computed": {name: contender.computed for name, contender in contenders.items()},
        **_against(costs, "padded", tokens),
    }


def memory(size: Size) -> dict[str, Any]:
    """Peak bytes of forward and backward pass, in processes of their own."""
    found: dict[str, list[dict[str, float]]] = {"chunked": [], "materialised": []}
    script = ROOT / "benchmarks/measuring/head_memory.py"
    for _ in range(min(size.rounds, 3)):  # it varies by less than a hundredth
        for way, results in found.items():
            command = [sys.executable, str(script), way, *map(str, size.head)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
    norms = [one["gradient_norm"] for results in found.values() for one in results]
    if max(norms) > 1.0001 * min(norms):
        raise RuntimeError(f"the two ways differ in their gradients: {norms}")
    pairs = list(zip(*found.values(), strict=True))
    result = {
        "tokens, vocabulary, width": size.head,
        **{way: {"bytes": spread([one["bytes"] for one in results])} for way, results in found.items()},
        "ratio": spread([ours["bytes"] / theirs["bytes"] for ours, theirs in pairs]),
        "cpu_ratio": spread([ours["cpu_seconds"] / theirs["cpu_seconds"] for ours, theirs in pairs]),
    }
    print(f"memory: {_text(result['ratio'])} of all logits; CPU time {_text(result['cpu_ratio'])}", flush=True)
    return result


def iteration(size: Size) -> dict[str, Any]:
    """Seconds of whole iterations and of their parts, SPEAR and Dr.BoT in turn, with two ways to replay."""
    parts = ("iteration", "rollout_generation", "rollout_environment", "rollout_other", "update")
    replay = "data.replay.init_args"
    recipes: dict[str, tuple[str, dict[str, Any]]] = {
        "Dr.BoT": ("drbot", {}),
        "SPEAR, drained": (
            "spear-drbot",
            # Once as many wins are there as half of an iteration's episodes, all of them are replayed, once.
            {f"{replay}.capacity": 64, f"{replay}.schedule": {"class_path": "Drain", "init_args": {"ready": 1.0}}},
        ),
        "SPEAR, mixed": ("spear-drbot", {}),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in recipes}
    used: dict[str, list[float]] = {name: [] for name in recipes}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(size.rounds):
            played = []
            for name, (arm, changes) in recipes.items():
                place = Path(folder) / f"{number}-{len(played)}"
                rows = iterations.run(arm, size.iterations, place, {**size.changes, **changes})[3:]
                # Means: a buffer that is drained costs nothing in most iterations.
                seconds[name].append({part: statistics.mean(row[f"time/{part}"] for row in rows) for part in parts})
                played.append([row["rollout/success"] for row in rows])
                used[name] += [row.get("replay/used", 0.0) for row in rows]
            if any(successes != played[0] for successes in played):
                raise RuntimeError("the recipes have not played the same episodes")
    totals = {name: [one["iteration"] for one in means] for name, means in seconds.items()}
    result: dict[str, Any] = {}
    for name, means in seconds.items():
        quotients = [ours / theirs for ours, theirs in zip(totals[name], totals["Dr.BoT"], strict=True)]
        result[name] = {
            "seconds": {part: statistics.median(one[part] for one in means) for part in parts},
            "replayed episodes": statistics.mean(used[name]),
            "ratio": spread(quotients),
        }
        print(f"iteration, {name}: {_text(result[name]['ratio'])} of Dr.BoT", flush=True)
    return result


def _row(prompt: np.ndarray, response: np.ndarray) -> Sample:
    ids = np.concatenate([prompt, response])
    generated = np.arange(len(ids)) >= len(prompt)
    return Sample(
        ids=ids.astype(np.int32),
        mask=generated,
        logps=np.where(generated, -1.0, 0.0).astype(np.float32),
        advantages=generated.astype(np.float32),
        turns=np.where(generated, 0, -1).astype(np.int16),
    )


def _own_share(rows: list[np.ndarray]) -> float:
    order = sorted_for_sharing(rows)
    common = sum(common_length(rows[a], rows[b]) for a, b in pairwise(order))
    return 1 - common / sum(map(len, rows))


def _against(costs: Mapping[str, Costs], rival: str, tokens: int) -> dict[str, Any]:
    """Figures of all contenders, and how many times the rival's cost is theirs."""
    figures: dict[str, Any] = {"against": rival, "contenders": {}}
    for name, cost in costs.items():
        speedup = ratio(costs[rival], cost)
        figures["contenders"][name] = {
            "seconds": spread(cost.wall),
            "cpu_seconds": spread(cost.cpu),
            "tokens_per_second": tokens / statistics.median(cost.wall),
            "times_as_fast": speedup,
        }
        wall, cpu = (_text(speedup[kind]) for kind in ("wall", "cpu"))
        print(f"{name}: {wall} times as fast as {rival} ({cpu} by CPU time)", flush=True)
    return figures


def _text(figure: Mapping[str, float]) -> str:
    return f"{figure['median']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "update": update,
        "matmul": matmul,
        "stepwise": stepwise,
        "memory": memory,
        "iteration": iteration,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small model, two rounds: to try it out")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help="some parts")
    parser.add_argument("--rounds", type=int, help="of each part")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = SMALL if given.quick else Size()
    if given.rounds:
        size = replace(size, rounds=given.rounds)
    record: dict[str, Any] = provenance(1, ROOT) | {"threads": given.threads, "quick": given.quick, "parts": {}}
    played = play(size.tasks, 8) if {"update", "matmul", "stepwise"} & set(given.only) else None
    for name in given.only:
        print(f"--- {name}", flush=True)
        needed = (size, played) if name in ("update", "matmul", "stepwise") else (size,)
        record["parts"][name] = parts[name](*needed)
        if given.out:
            write_atomically(given.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

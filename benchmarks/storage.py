"""What a stored token of a trajectory takes: real ALFWorld rollouts in both contexts, put away as replay entries.

    python benchmarks/storage.py --out benchmarks/storage.json

The policy that ships with the package plays generated games. Rows of half of the episodes are put away as the replay
buffer does it, and it is told per token of these rows:

* ``arrays``: bytes of five arrays as long as the row (id, mask, log-probability, advantage, turn), as they were stored
  before;
* ``unshared``: of its ids and of the log-probabilities of its generated tokens;
* ``stored``: of what is stored now, by part and in all, and as ``tracemalloc`` sees it with every Python object;
* ``file``: of the checkpoint's file, before and now;
* CPU microseconds to put a token away and to take it out again.

Rows taken out are compared with the rows that were put in, bit by bit.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison.provenance import provenance

from spear_lightning.agents.base import Agent
from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.data.samples import Sample, samples_of
from spear_lightning.data.token_pool import StoredSample, store_samples
from spear_lightning.engines.base import Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.alfworld import ALFWorld
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Episode
from spear_lightning.rollout.specs import EpisodeSpec

ROOT = Path(__file__).resolve().parents[1]
AGENTS = {"transcript": TranscriptAgent, "stepwise": StepwiseAgent}
NAMES = ("ids", "mask", "logps", "advantages", "turns")
"""Of a row's arrays, without the weights that only corrected rows have."""


def play(agent: Agent, tasks: int, group: int, turns: int) -> list[Episode]:
    """Episodes of the shipped policy."""
    policy = Policy("embedded")
    agent.bind(policy.tokenizer)
    suite = ALFWorld(train=tasks, validation=1, test=1, max_steps=turns)
    suite.prepare()
    engine = HuggingFaceEngine()
    engine.sync(policy, 0)
    specs = [EpisodeSpec(task, number, i) for number, task in enumerate(suite.tasks("train")) for i in range(group)]
    with EnvironmentPool(suite, workers=2, step_timeout=60.0) as pool:
        limit = 8 if agent.context == "conversation" else 24
        played = Collector(pool, agent, engine).play(specs, Sampling(limit), iteration=0, seed=1, max_turns=turns)
    return [episode for episode in played.episodes if episode.status != "aborted"]


def admitted(episodes: Sequence[Episode], group: int) -> list[Sample]:
    """Rows of half of each group, about as many as training admits.

    Which half does not matter to what rows look like, and the shipped policy seldom wins in ``stepwise`` context, which
    it was not trained for: they are taken by number and not by success.
    """
    return [
        row
        for episode in episodes
        if episode.index < group // 2
        for _, row in samples_of(episode, np.ones(len(episode.turns)), np.ones(len(episode.turns), bool))
    ]


def exact(row: Sample, again: Sample) -> bool:
    """Whether all that is stored of a row came back."""
    return all(
        getattr(row, name).dtype == getattr(again, name).dtype
        and np.array_equal(getattr(row, name), getattr(again, name))
        for name in NAMES
        if name != "advantages"
    )


def file_bytes(values: Any) -> int:
    """Of a file with these tensors."""
    file = io.BytesIO()
    torch.save(values, file)
    return file.tell()


def parts(stored: Iterable[StoredSample]) -> dict[str, int]:
    """Bytes of the arrays, by what they are."""
    stored = list(stored)
    pools = {id(row.pool): row.pool for row in stored}.values()
    return {
        "ids": sum(pool.tokens.nbytes for pool in pools),
        "slices": sum(row.slices.nbytes for row in stored),
        "log-probabilities": sum(row.logps.nbytes for row in stored),
        "spans": sum(row.spans.nbytes for row in stored),
    }


def measure(rows: Sequence[Sample]) -> dict[str, Any]:
    """All figures of the rows of one context."""
    tokens = sum(map(len, rows))
    generated = sum(int((row.turns >= 0).sum()) for row in rows)
    started = time.process_time()
    store_samples(rows)
    put = time.process_time() - started
    tracemalloc.start()
    stored = store_samples(rows)
    traced = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    started = time.process_time()
    again = [row.with_advantage(1.0) for row in stored]
    taken = time.process_time() - started
    assert all(map(exact, rows, again)), "a row has not come back as it was"
    arrays = {name: sum(getattr(row, name).nbytes for row in rows) for name in NAMES}
    by_part = parts(stored)
    before = [{name: torch.from_numpy(getattr(row, name)) for name in arrays} for row in rows]
    pools = [torch.from_numpy(pool.tokens) for pool in {id(row.pool): row.pool for row in stored}.values()]
    now = [{name: torch.from_numpy(getattr(row, name)) for name in ("slices", "logps", "spans")} for row in stored]
    return {
        "rows": len(rows),
        "tokens": tokens,
        "tokens_per_row": tokens / len(rows),
        "generated": generated / tokens,
        "bytes_per_token": {
            "arrays": sum(arrays.values()) / tokens,
            "unshared": (4 * tokens + 4 * generated) / tokens,
            "stored": sum(by_part.values()) / tokens,
            "stored_by_part": {name: size / tokens for name, size in by_part.items()},
            "stored_with_objects": traced / tokens,
            "file_before": file_bytes(before) / tokens,
            "file": file_bytes([pools, now]) / tokens,
        },
        "microseconds_per_token": {"put": put / tokens * 1e6, "take": taken / tokens * 1e6},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter episodes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks, group, turns = (4, 4, 8) if options.quick else (16, 8, 20)
    contexts = {}
    for name, make in AGENTS.items():
        episodes = play(make(), tasks, group, turns)
        contexts[name] = {"episodes": len(episodes), **measure(admitted(episodes, group))}
        found = contexts[name]["bytes_per_token"]
        print(
            f"{name}: {contexts[name]['tokens']} tokens, bytes a token {found['arrays']:.2f} as arrays, "
            f"{found['unshared']:.2f} unshared, {found['stored']:.2f} stored "
            f"({found['stored_with_objects']:.2f} with objects; file {found['file_before']:.2f} -> {found['file']:.2f})"
        )
    report = {"settings": {"tasks": tasks, "group": group, "turns": turns}, "contexts": contexts}
    report |= provenance(1, ROOT)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(contexts, indent=1))


if __name__ == "__main__":
    main()

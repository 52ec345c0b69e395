"""How fast episodes are played, against the usual ways, in turns on one machine.

    python benchmarks/rollouts.py                      # all parts, about 15 minutes on two cores
    python benchmarks/rollouts.py --quick              # seconds each, to see that it works
    python benchmarks/rollouts.py --only conversation  # one part

Ratios are the other side's time over ours, pair by pair: median, least and most. Fresh models, so every response runs
to its limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measuring.playing import GenerateEngine, Player, SlowSuite, converse, games, make_policy
from measuring.ratios import compare, machine

from spear_lightning.engines.base import RolloutEngine
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.alfworld.suite import ALFWorld
from spear_lightning.environments.base import Observation
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Asynchronous, Lockstep, RolloutSchedule


@dataclass(frozen=True)
class Scale:
    """How much is played: ``repeats`` runs of each side, workloads divided by ``part``."""

    repeats: int
    part: int


def synced(engine: RolloutEngine, policy: Policy) -> RolloutEngine:
    engine.sync(policy, 0)
    return engine


def conversation(scale: Scale, model: str) -> dict[str, Any]:
    """32 episodes of 10 turns: prompt 128, 24 new and 40 observed tokens a turn."""
    policy = make_policy(model)
    work = {"episodes": 32 // scale.part, "turns": 10, "prompt": 128, "new": 24, "seen": 40, "top": 2000}

    def side(engine: RolloutEngine) -> Callable[[], Any]:
        return lambda: converse(synced(engine, policy), **work)

    sides = {"HuggingFaceEngine": side(HuggingFaceEngine()), "transformers generate": side(GenerateEngine())}
    return compare(sides, scale.repeats, work=work["episodes"] * work["turns"] * work["new"], unit="tokens") | work


def single(scale: Scale, model: str) -> dict[str, Any]:
    """64 prompts of 256 tokens, 64 new tokens each."""
    policy = make_policy(model)
    work = {"episodes": 64 // scale.part, "turns": 1, "prompt": 256, "new": 64, "seen": 0, "top": 2000}

    def side(engine: RolloutEngine) -> Callable[[], Any]:
        return lambda: converse(synced(engine, policy), **work)

    sides = {"HuggingFaceEngine": side(HuggingFaceEngine()), "transformers generate": side(GenerateEngine())}
    return compare(sides, scale.repeats, work=work["episodes"] * work["new"], unit="tokens") | work


def alfworld(scale: Scale, model: str) -> dict[str, Any]:
    """16 games, 8 attempts each, 15 turns of 24 tokens, a prompt of its own for every turn."""
    suite, policy = games(16), make_policy(model, len_of_tokenizer())
    engines: dict[str, RolloutEngine] = {
        "HuggingFaceEngine": HuggingFaceEngine(),
        "without reuse": HuggingFaceEngine(keep_cache=False, share_prompts=False),
        "transformers generate": GenerateEngine(),
    }
    settings = {"groups": range(max(1, 16 // scale.part)), "size": 8, "turns": 15, "new": 24}
    players = {name: Player(suite, engine, policy, **settings) for name, engine in engines.items()}
    return _compare_players(players, scale) | {**settings, "groups": len(settings["groups"])}


def schedules(scale: Scale, seconds: float, rare: float) -> dict[str, Any]:
    """Lockstep, waves and continuous, on ALFWorld whose steps wait for ``seconds``, and one in 32 for ``rare``."""
    quick_suite, policy = games(16), make_policy("1 M", len_of_tokenizer())
    suite = SlowSuite(quick_suite, seconds, rare) if seconds else quick_suite
    kinds: dict[str, RolloutSchedule] = {
        "Asynchronous": Asynchronous(),
        "Lockstep(2)": Lockstep(2),
        "Lockstep(1)": Lockstep(),
    }
    settings = {"groups": range(max(1, 8 // scale.part)), "size": 8, "turns": 10, "new": 24}
    workers = 8 if seconds else 2
    players = {
        name: Player(suite, HuggingFaceEngine(), policy, **settings, workers=workers, schedule=schedule)
        for name, schedule in kinds.items()
    }
    added = {"groups": len(settings["groups"]), "workers": workers, "step_seconds": seconds, "rare_seconds": rare}
    return _compare_players(players, scale) | {**settings, **added}


def environment_workers(scale: Scale) -> dict[str, Any]:
    """ALFWorld steps without a model: one and two environment processes."""
    suite = games(16)
    pools = {workers: EnvironmentPool(suite, workers=workers) for workers in (2, 1)}
    tasks = suite.tasks("train")
    turns = 30

    def play(pool: EnvironmentPool) -> None:
        seen: dict[int, Observation] = pool.reset({slot: tasks[slot % 16] for slot in range(128)})
        for turn in range(turns):
            going = {slot: seen[slot].admissible for slot in seen if not seen[slot].done}
            seen = pool.step({slot: actions[(7 * slot + turn) % len(actions)] for slot, actions in going.items()})
        pool.release(range(128))

    try:
        sides = {f"{workers} workers": lambda pool=pool: play(pool) for workers, pool in pools.items()}
        return compare(sides, scale.repeats, work=128, unit="episodes") | {"episodes": 128, "turns": turns}
    finally:
        for pool in pools.values():
            pool.close()


def rollout_processes(scale: Scale, model: str) -> dict[str, Any]:
    """Two processes that play half of the episodes each, as two ranks do, and one that plays all; one thread each."""
    suite = games(16)
    groups = max(2, 16 // scale.part)
    halves = [_Process(suite, model, range(groups)[rank::2]) for rank in range(2)]
    whole = [_Process(suite, model, range(groups))]

    def side(processes: list[_Process]) -> Callable[[], Any]:
        def play() -> None:
            for process in processes:
                process.pipe.send(True)
            for process in processes:
                process.pipe.recv()

        return play

    try:
        sides = {"2 processes": side(halves), "1 process": side(whole)}
        result = compare(sides, scale.repeats, work=8 * groups, unit="episodes")
        return result | {"episodes": 8 * groups, "turns": 15, "new": 24}
    finally:
        for process in (*halves, *whole):
            process.pipe.send(False)
            process.process.join()


class _Process:
    """A process that plays its groups whenever it is told to."""

    def __init__(self, suite: ALFWorld, model: str, groups: range) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, suite, model, groups))
        self.process.start()


def _serve(pipe: Connection, suite: ALFWorld, model: str, groups: range) -> None:
    torch.set_num_threads(1)
    policy = make_policy(model, len_of_tokenizer())
    player = Player(suite, HuggingFaceEngine(), policy, groups=groups, size=8, turns=15, new=24, workers=1)
    while pipe.recv():
        player.play()
        pipe.send(None)
    player.close()


def len_of_tokenizer() -> int:
    return 704  # the package's tokenizer has 653 entries


def _compare_players(players: dict[str, Player], scale: Scale) -> dict[str, Any]:
    try:
        episodes = len(next(iter(players.values())).specs)
        sides = {name: player.play for name, player in players.items()}
        result = compare(sides, scale.repeats, work=episodes, unit="episodes")
        for name, player in players.items():
            result[name]["shares"] = player.shares
        return result
    finally:
        for player in players.values():
            player.close()


def parts(scale: Scale) -> dict[str, Callable[[], dict[str, Any]]]:
    """What can be measured, by name."""
    return {
        "conversation, 1 M": lambda: conversation(scale, "1 M"),
        "conversation, 28 M": lambda: conversation(scale, "28 M"),
        "single turn, 1 M": lambda: single(scale, "1 M"),
        "single turn, 28 M": lambda: single(scale, "28 M"),
        "ALFWorld, 1 M": lambda: alfworld(scale, "1 M"),
        "environment workers": lambda: environment_workers(scale),
        "rollout processes, 1 M": lambda: rollout_processes(scale, "1 M"),
        "schedules, fast steps": lambda: schedules(scale, 0.0, 0.0),
        "schedules, slow steps": lambda: schedules(scale, 0.02, 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="little work, two runs of each side")
    parser.add_argument("--repeats", type=int, default=7, help="measured runs of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the process that generates")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scale = Scale(2, 8) if arguments.quick else Scale(arguments.repeats, 1)
    results: dict[str, Any] = {"machine": machine(), "quick": arguments.quick}
    for name, measure in parts(scale).items():
        if any(wanted in name for wanted in arguments.only):
            results[name] = result = measure()
            print(name)
            for side in (key for key, value in result.items() if isinstance(value, dict) and "seconds" in value):
                speed = next(text for text in result[side].items() if text[0].endswith("_per_second"))
                print(f"  {side:24} {result[side]['seconds']['median']:8.3f} s  {speed[1]:9.1f} {speed[0]}", end="  ")
                print(f"x {result['ratios'][side]}" if side in result["ratios"] else result[side].get("shares", ""))
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What TextWorld's games cost to make and to play, and whether their walkthroughs win.

    python benchmarks/textworld_games.py --games 4

Prints a line of a Markdown table for each challenge: CPU seconds to make a game (with the compilers it starts), its
size, CPU milliseconds to load and start one, to start it again and for a step (seeded walks through admissible
actions), and how many games their walkthroughs win.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spear_lightning.environments.textworld import TextWorld

CHALLENGES: list[tuple[Any, dict[str, Any]]] = [
    ("coin_collector", {"level": 5}),
    ("coin_collector", {"level": 110}),
    ("treasure_hunter", {"level": 5}),
    ("treasure_hunter", {"level": 15}),
    ("cooking", {"recipe": 2, "take": 2, "cook": True, "open": True, "go": 6}),
    ("simple", {"rewards": "dense", "goal": "brief"}),
]
STEPS = 100


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    return sum(os.times()[:4])


def timed(costs: list[float], call: Callable[[], Any]) -> Any:
    """Call, and note the CPU milliseconds it took."""
    before = time.process_time()
    result = call()
    costs.append((time.process_time() - before) * 1000)
    return result


def walk(env: Any, task: str, starts: list[float], steps: list[float], rng: random.Random) -> None:
    """Play at random, starting again whenever the game is over."""
    _, info = env.reset(options={"task": task})
    for _ in range(STEPS):
        _, _, terminated, truncated, info = timed(steps, partial(env.step, rng.choice(info["admissible_actions"])))
        if terminated or truncated:
            _, info = timed(starts, env.reset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--games", type=int, default=4, help="of each challenge")
    count = parser.parse_args().games
    print("| challenge | make, CPU s | KB | load and start, ms | start again, ms | step, ms | won by walkthrough |")
    print("|---|---|---|---|---|---|---|")
    for challenge, settings in CHALLENGES:
        with tempfile.TemporaryDirectory() as folder:
            suite = TextWorld(challenge, settings, train=count, cache_dir=folder)
            suite.games.make("test-0")  # imports and compilers' first pages are no game's cost
            made, loads, starts, steps, won = list[float](), list[float](), list[float](), list[float](), 0
            for number in range(count):
                before = cpu_seconds()
                suite.games.make(f"train-{number}")
                made.append(cpu_seconds() - before)
            env, rng = suite.make(), random.Random(0)
            env.reset(options={"task": "test-0"})
            for number in range(count):
                task = f"train-{number}"
                timed(loads, partial(env.reset, options={"task": task}))
                walk(env, task, starts, steps, rng)
                timed(starts, env.reset)
                game = json.loads((suite.games.path / task / "game.json").read_text(encoding="utf-8"))
                won += any(env.step(command)[4]["won"] for command in game["metadata"]["walkthrough"])
            env.close()
            size = sum(file.stat().st_size for file in Path(folder).rglob("train-*/*")) / count / 1000
            options = ", ".join(f"{key} {value}".removesuffix(" True") for key, value in settings.items())
            middle = statistics.median
            print(
                f"| `{challenge}`, {options} | {middle(made):.1f} | {size:.0f} | {middle(loads):.0f} "
                f"| {middle(starts):.0f} | {middle(steps):.1f} | {won}/{count} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""What the caches of the ALFWorld engine save: stock engine and ours, same games, same commands, one run.

    python benchmarks/alfworld_engine.py --out alfworld_engine.json

Costs are CPU milliseconds of this process. A line is printed and written for each of:

* ``first load``: a game never seen on this machine (translated from PDDL), loaded and started;
* ``load``: a game whose translation is on the disk, loaded and started by a fresh process;
* ``reset``: a loaded game started again;
* ``step``: one command, a seeded walk through admissible commands.

The stock engine keeps nothing, so its ``first load`` and ``load`` are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
from textworld.envs.pddl import PddlEnv

from spear_lightning.environments.alfworld import SceneSize
from spear_lightning.environments.alfworld.engine import GameCache, make_engine
from spear_lightning.environments.alfworld.games import write_official_layout
from spear_lightning.environments.alfworld.generated import solved_games
from spear_lightning.environments.alfworld.rooms import TASK_TYPES

SCENES = {"small": SceneSize(), "large": SceneSize(receptacles=(15, 25), distractors=(10, 20))}
Costs = dict[str, list[float]]


def stock_engine() -> Any:
    """ALFWorld as it comes, without the process that it would start for each environment."""
    return AlfredInfos(AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True))))


def timed(costs: list[float], call: Callable[[], Any]) -> Any:
    """Call, and note the CPU milliseconds it took."""
    before = time.process_time()
    result = call()
    costs.append((time.process_time() - before) * 1000)
    return result


def started(engine: Any, path: str) -> Any:
    """Load and start a game."""
    engine.load(path)
    return engine.reset()


def play(engine: Any, costs: Costs, path: str, steps: int, seed: int) -> list[str]:
    """Start a loaded game again and walk at random; returns the observations."""
    rng = random.Random(seed)
    state = timed(costs["reset"], engine.reset)
    observations = [state.feedback]
    for _ in range(steps):
        command = rng.choice(state["admissible_commands"])
        state, _, done = timed(costs["step"], partial(engine.step, command))
        observations.append(state.feedback)
        if done:
            break
    return observations


def measure(scene: SceneSize, games: int, steps: int) -> dict[str, Costs]:
    """Costs of both engines on the same games; raises if what they say differs."""
    stock_costs: Costs = {"load": [], "reset": [], "step": []}
    costs: Costs = {"first load": [], "load": [], "reset": [], "step": []}
    with tempfile.TemporaryDirectory() as folder:
        recipes = [(TASK_TYPES[number % len(TASK_TYPES)], number, scene) for number in range(games)]
        ids = write_official_layout(Path(folder), "train", solved_games(None, recipes))
        paths = [str(Path(folder) / name / "game.tw-pddl") for name in ids]
        translations = Path(folder) / "translations"
        stock = stock_engine()
        fresh, ours = (make_engine(GameCache(translations, capacity=games)) for _ in range(2))
        for engine in (fresh, ours):  # imports and the grammar, parsed once per process, are no game's cost
            started(engine, paths[0])
        for seed, path in enumerate(paths):
            timed(stock_costs["load"], partial(started, stock, path))
            if seed:
                timed(costs["first load"], partial(started, fresh, path))
                timed(costs["load"], partial(started, ours, path))
            else:
                started(ours, path)
            if play(stock, stock_costs, path, steps, seed) != play(ours, costs, path, steps, seed):
                raise RuntimeError(f"the engines disagree on {path}")
    return {"stock": stock_costs, "ours": costs}


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high, "count": len(values)}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=12, help="games of each scene size")
    parser.add_argument("--steps", type=int, default=20, help="steps of each game")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("alfworld", "textworld")},
        },
        "unit": "CPU milliseconds",
        "scenes": {},
    }
    for label, scene in SCENES.items():
        measured = measure(scene, arguments.games, arguments.steps)
        lines = {
            engine: {name: summary(values) for name, values in costs.items()} for engine, costs in measured.items()
        }
        ratios = {name: lines["stock"][name]["median"] / lines["ours"][name]["median"] for name in measured["stock"]}
        result["scenes"][label] = {**lines, "ratio": ratios}
        for engine, costs in lines.items():
            for name, cost in costs.items():
                spread = f"{cost['quartile_1']:8.2f} .. {cost['quartile_3']:8.2f}"
                print(f"{label:6} {engine:6} {name:11} {cost['median']:9.3f} ms  ({spread})")
        print(f"{label:6} ratio  " + ", ".join(f"{name} {ratio:.0f}x" for name, ratio in ratios.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

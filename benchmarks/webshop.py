"""What the WebShop engine costs: building and loading a large catalogue, a step, a search.

    python benchmarks/webshop.py --out benchmarks/webshop.json

Three measurements, each on generated catalogues, written in the official file formats where they are large:

* ``large``: a catalogue file of ``--products`` products is read and built once (seconds, peak memory of its own of
  the building process), then opened by fresh processes (milliseconds; private and shared memory after playing);
* ``steps``: steps a second of one process on 1 000 products, the expert's own moves played again, and the time that a
  page takes once its records have been read;
* ``search``: milliseconds a query on 20 000 products.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spear_lightning.environments.webshop.catalogue import Catalogue, build_catalogue
from spear_lightning.environments.webshop.environment import WebShopEnv, task_id
from spear_lightning.environments.webshop.expert import ShoppingExpert
from spear_lightning.environments.webshop.generator import GeneratedProducts, write_official_layout
from spear_lightning.environments.webshop.goals import GoalKind
from spear_lightning.environments.webshop.pages import item_page, results_page
from spear_lightning.environments.webshop.sources import OfficialFiles

GOALS: GoalKind = "human"


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, and those of mapped files, which all processes share."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {"own": int(fields["RssAnon"][0]) / 1024, "mapped": int(fields["RssFile"][0]) / 1024}


def in_fresh_process(call: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Call in a process of its own, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def build_large(data: Path, root: Path) -> dict[str, float]:
    """Read the official files and build the catalogue."""
    before = peak = memory()["own"]
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, memory()["own"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, cpu = time.perf_counter(), time.process_time()
    build_catalogue(root, OfficialFiles(data))
    done.set()
    watcher.join()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_own_megabytes": peak - before,
    }


def open_large(folder: Path, episodes: int) -> dict[str, float]:
    """Open a built catalogue and play in it."""
    before = memory()
    started = time.perf_counter()
    catalogue = Catalogue(folder)
    opened = (time.perf_counter() - started) * 1000
    loaded = memory()
    play(catalogue, episodes)
    after = memory()
    return {
        "milliseconds": opened,
        "own_megabytes_opened": loaded["own"] - before["own"],
        "own_megabytes_played": after["own"] - before["own"],
        "mapped_megabytes_played": after["mapped"] - before["mapped"],
    }


def play(catalogue: Catalogue, episodes: int) -> tuple[WebShopEnv, list[tuple[str, list[str]]], int]:
    """Let the expert play; returns the environment, its moves by task, and how many goals it won."""
    env, expert = WebShopEnv(catalogue), ShoppingExpert(0)
    moves: list[tuple[str, list[str]]] = []
    won = 0
    for number in range(min(episodes, catalogue.goals(GOALS))):
        task = task_id(GOALS, number)
        text, info = env.reset(options={"task": task})
        expert.reset(info["task"], text)
        actions: list[str] = []
        over = False
        while not over:
            actions.append(expert.act(text))
            text, _, terminated, truncated, info = env.step(actions[-1])
            over = terminated or truncated
        moves.append((task, actions))
        won += info["won"]
    return env, moves, won


def measure_large(products: int, episodes: int) -> dict[str, Any]:
    """Building and opening a large catalogue."""
    with tempfile.TemporaryDirectory() as folder:
        data, root = Path(folder) / "data", Path(folder) / "cache"
        write_official_layout(data, products)
        source_bytes = sum(path.stat().st_size for path in data.iterdir())
        built = in_fresh_process(build_large, data, root)
        (catalogue,) = (path for path in root.iterdir() if path.is_dir())
        sizes = {path.name: path.stat().st_size for path in catalogue.iterdir()}
        first, second = (in_fresh_process(open_large, catalogue, episodes) for _ in range(2))
        return {
            "products": products,
            "source_bytes_per_product": source_bytes / products,
            "build": built,
            "disk_bytes_per_product": sum(sizes.values()) / products,
            "disk_bytes_per_product_by_file": {name: size / products for name, size in sorted(sizes.items())},
            "open": second,
            "own_bytes_per_product_opened": second["own_megabytes_opened"] * 2**20 / products,
            "open_first": first,
        }


def measure_steps(episodes: int, repetitions: int) -> dict[str, Any]:
    """Steps a second and milliseconds a page on 1 000 products."""
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(build_catalogue(Path(folder), GeneratedProducts(1000)))
        env, moves, won = play(catalogue, episodes)
        rates = []
        for _ in range(repetitions):
            started, steps = time.process_time(), 0
            for task, actions in moves:
                env.reset(options={"task": task})
                for action in actions:
                    env.step(action)
                steps += len(actions)
            rates.append(steps / (time.process_time() - started))
        products = [catalogue.entry(number).product for number in range(1000)]
        started = time.process_time()
        for product in products:
            item_page(product, {}).admissible  # noqa: B018 - it is made when asked for
        item = time.process_time() - started
        started = time.process_time()
        for first in range(990):
            results_page([catalogue.card(number) for number in range(first, first + 10)], 1, 50).admissible  # noqa: B018
        results = time.process_time() - started
        return {
            "products": 1000,
            "episodes": len(moves),
            "won": won / len(moves),
            "steps_per_second": spread(rates),
            "item_page_milliseconds": item,
            "results_page_milliseconds": results / 990 * 1000,
        }


def measure_search(products: int, queries: int) -> dict[str, Any]:
    """CPU milliseconds of searches for what human goals ask."""
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(build_catalogue(Path(folder), GeneratedProducts(products)))
        texts = [catalogue.goal(GOALS, number).instruction for number in range(queries)]
        costs = []
        for text in texts:
            started = time.process_time()
            catalogue.search.search(text)
            costs.append((time.process_time() - started) * 1000)
        return {"products": products, "queries": queries, "milliseconds": spread(costs)}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high, "count": len(values)}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=100_000, help="size of the large catalogue")
    parser.add_argument("--search-products", type=int, default=20_000, help="size of the catalogue that is searched")
    parser.add_argument("--episodes", type=int, default=300, help="goals that are played")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "PyStemmer", "rapidfuzz")},
        },
        "steps": measure_steps(arguments.episodes, repetitions=10),
        "search": measure_search(arguments.search_products, queries=500),
        "large": measure_large(arguments.products, arguments.episodes),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

r"""The paper's table in small: four published recipes with and without SPEAR, on two worlds, several seeds each.

    python benchmarks/table.py alfworld                                     # all cells; again, and it goes on
    python benchmarks/table.py alfworld --arms grpo spear-grpo --seeds 1    # two of them

It calls benchmarks/compare.py with the recipes of configs/algorithm as they are, scaled by benchmarks/table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import compare

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ("grpo", "gigpo", "drbot-grpo", "drbot-gigpo")
ARMS = tuple(name for baseline in BASELINES for name in (baseline, f"spear-{baseline}"))


def arguments_of(world: str, arms: Sequence[str], seeds: Sequence[int], jobs: int, output: Path) -> list[str]:
    """Arguments of ``compare.py`` for some cells of the table.

    Args:
        world: a configuration of benchmarks/table.
        arms: names of recipes in configs/algorithm.
        seeds: of each arm.
        jobs: runs at a time.
        output: folder of the results.
    """
    given = [f"--base={ROOT / 'benchmarks/table' / f'{world}.yaml'}", f"--output={output}", f"--jobs={jobs}"]
    for arm in arms:
        scale = [ROOT / "benchmarks/table/scale-spear.yaml"] if arm.startswith("spear-") else []
        overlays = [ROOT / "configs/algorithm" / f"{arm}.yaml", *scale]
        given.append(f"--arm={arm}={','.join(map(str, overlays))}")
    pairs = [f"spear-{arm}={arm}" for arm in arms if f"spear-{arm}" in arms]
    baseline = ["--baseline", *pairs] if pairs else []
    return [*given, *baseline, "--temperatures", "0.4", "1", "--seeds", *map(str, seeds)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells of the table; the exit status is that of ``compare.py``.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    worlds = sorted(path.stem for path in (ROOT / "benchmarks/table").glob("*.yaml") if "scale" not in path.stem)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=worlds)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/table-WORLD")
    given = parser.parse_args(arguments)
    output = given.output or ROOT / "benchmarks/results" / f"table-{given.world}"
    return compare.main(arguments_of(given.world, given.arms, given.seeds, given.jobs, output))


if __name__ == "__main__":
    sys.exit(main())

r"""Compare configurations over seeds: any overlays on one base config, each trained, tested and recorded run by run.

    python benchmarks/compare.py --base configs/quickstart.yaml \
        --arm grpo=benchmarks/arms/grpo.yaml --arm spear-grpo=benchmarks/arms/spear-grpo.yaml \
        --seeds 1 2 3 4 5 --jobs 2 --output benchmarks/results/quickstart

Every finished run leaves one small JSON file; called again, the comparison skips what is finished, goes on with what
was interrupted and tries again what failed. Tables and a picture are renewed after each run. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from comparison.execution import Executor, InterruptedRunError, Processes, environment
from comparison.figure import draw
from comparison.plan import Arm, Comparison, PlanError, Run, compose, differences
from comparison.provenance import provenance
from comparison.record import FailedRun, RunRecord
from comparison.summary import Summary, summary_json, summary_markdown

from spear_lightning.utils.atomic import write_atomically

SPEAR = (sys.executable, "-m", "spear_lightning.cli.main")


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = SPEAR) -> int:
    """Run the comparison; the exit status is 0 if every run has finished, 1 if one failed, 2 if it cannot be run.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
        command: starts ``spear``.
    """
    given = _parser().parse_args(arguments)
    try:
        arms = tuple(Arm.parse(text) for text in given.arm)
        comparison = Comparison(
            base=given.base,
            arms=arms,
            seeds=tuple(given.seeds),
            settings=tuple(given.set),
            temperatures=tuple(f"{temperature:g}" for temperature in given.temperatures),
            output=given.output,
            command=tuple(command),
        )
        baselines = _baselines(given.baseline, [arm.name for arm in arms])
        _report(f"reading the configuration of {len(arms)} arms")
        with ThreadPoolExecutor(given.jobs) as pool:
            composed = pool.map(lambda arm: compose(comparison, arm, environment()), arms)
            configs = {arm.name: config for arm, config in zip(arms, composed, strict=True)}
    except PlanError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    for name, config in configs.items():
        write_atomically(comparison.output / "configs" / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False))
    return _Session(comparison, configs, baselines, given.jobs).work()


class _Session:
    """One call of the comparison: what has come out so far, and what is still to be done."""

    def __init__(
        self, comparison: Comparison, configs: Mapping[str, Any], baselines: Mapping[str, str], jobs: int
    ) -> None:
        self.comparison, self.configs, self.baselines, self.jobs = comparison, configs, baselines, jobs
        # Seed by seed, so that what there is at any moment compares all arms.
        self.runs = [Run(arm, seed, configs[arm.name]) for seed in comparison.seeds for arm in comparison.arms]
        root = Path(__file__).resolve().parents[1]
        self.executor = Executor(comparison, provenance(jobs, root), Processes(), _report)
        self.finished: list[RunRecord] = []
        self.failed: list[FailedRun] = []

    def work(self) -> int:
        """Do what is left to do, and summarise after each run."""
        left = []
        for run in self.runs:
            record = self.executor.finished(run)
            if record is None:
                left.append(run)
            else:
                self.finished.append(record)
        if self.finished:
            _report(f"{len(self.finished)} of {len(self.runs)} runs are finished already")
            self._summarise()
        before = signal.signal(signal.SIGTERM, _interrupt)
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in as_completed([pool.submit(self.executor.execute, run) for run in left]):
                self._take(future.result())
        except (KeyboardInterrupt, InterruptedRunError):
            _report("interrupted: the same command goes on from here")
            return 130
        finally:
            self.executor.processes.stop()
            pool.shutdown(cancel_futures=True)
            signal.signal(signal.SIGTERM, before)
        if self.finished:
            _report(f"summary in {self.comparison.output / 'summary.md'}")
        return 1 if self.failed else 0

    def _take(self, record: RunRecord | FailedRun) -> None:
        name = f"{record.arm}-seed{record.seed}"
        if isinstance(record, FailedRun):
            self.failed.append(record)
            _report(f"{name}: FAILED: {record.error}")
            for line in record.log:
                print(f"    {line}", flush=True)
        else:
            self.finished.append(record)
            tests = ", ".join(f"{result.success:.1%} at T = {name}" for name, result in record.tests.items())
            count = f"{len(self.finished)} of {len(self.runs)}"
            _report(f"{name}: finished, test {tests}, {record.seconds['training']:.0f} s of training; {count} runs")
        self._summarise()

    def _summarise(self) -> None:
        if not self.finished:
            return
        arms = [arm.name for arm in self.comparison.arms]
        summary = Summary.of(
            self.finished, self.failed, arms, self.comparison.temperatures, self.baselines, differences(self.configs)
        )
        output = self.comparison.output
        write_atomically(output / "summary.json", summary_json(summary))
        write_atomically(output / "summary.md", summary_markdown(summary))
        write_atomically(output / "comparison.png", draw(summary))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Compare overlays on one base configuration over seeds; can be called again at any time.",
    )
    parser.add_argument("--base", type=Path, required=True, metavar="YAML", help="configuration every arm starts from")
    parser.add_argument(
        "--arm",
        action="append",
        required=True,
        metavar="NAME=YAML[,YAML...]",
        help="an arm and its overlays; repeat it",
    )
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="one run of each arm for each seed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs side by side (default 1)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting for every arm, as trainer.max_epochs=40",
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="[ARM=]BASELINE",
        help="the arm that differences are taken to, for all arms or for the one named (default: the first arm)",
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[1.0, 0.4],
        help="sampling temperatures of the test, the main one first (default 1 0.4)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _baselines(given: Sequence[str], arms: Sequence[str]) -> dict[str, str]:
    """The baseline of each arm that has one, in the order of the arms."""
    common, own = arms[0], {}
    for text in given:
        arm, equals, baseline = text.rpartition("=")
        for name in (arm, baseline) if equals else (baseline,):
            if name not in arms:
                raise PlanError(f"--baseline {text}: there is no arm {name!r}; the arms are {', '.join(arms)}")
        if equals:
            own[arm] = baseline
        else:
            common = baseline
    chosen = {arm: own.get(arm, common) for arm in arms}
    return {arm: baseline for arm, baseline in chosen.items() if arm != baseline}


_PRINTING = threading.Lock()


def _report(line: str) -> None:
    with _PRINTING:
        print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

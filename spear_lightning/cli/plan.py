"""``spear plan``: whether a run will fit into memory, before anything is started.

    spear plan -c configs/alfworld.yaml -c configs/model/qwen2.5-7b.yaml -c configs/strategy/zero3.yaml \
        --trainer.devices 8 --trainer.num_nodes 2 --memory 80GiB

It takes what ``spear fit`` takes and composes the configuration in the same way; of the model only ``config.json`` is
read. The exit status is 0 if the run fits and 1 if not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from spear_lightning.cli.fit import SpearCLI, keys_named, make_cli
from spear_lightning.planning.inputs import read_situation
from spear_lightning.planning.memory import PHASES, MemoryPlan
from spear_lightning.planning.suggestions import Situation, Suggestion, suggestions
from spear_lightning.utils.atomic import write_atomically

_UNITS = {"": 1, **{f"{letter}b": 1000**k for k, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**k for k, letter in enumerate("kmgt", 1)}
_GIB = 1024**3


class PlanCLI(SpearCLI):
    """The command line of ``spear fit`` up to the composed configuration; nothing is instantiated or run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What is planned is a ``fit``."""
        return {"fit": SpearCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what only the plan takes."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--memory",
            type=str,
            help="Of a GPU, as 80GiB (with trainer.accelerator cpu: of a node's RAM); default: what this machine has.",
        )
        parser.add_argument(
            "--context", type=int, help="Tokens of the longest sequence; default: what agent, engine and model allow."
        )
        parser.add_argument("--json", type=str, help="File to write the plan to.")

    def _set_seed(self) -> None:
        """Draw nothing."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def main(arguments: Sequence[str]) -> int:
    """Plan a run and print the plan.

    Args:
        arguments: as of ``spear fit``, and ``--memory``, ``--context`` and ``--json``.

    Returns:
        The exit status: 0 if the run fits, 1 if not.

    Raises:
        ValueError: something cannot be planned; the message names the key.
    """
    sys.argv = [sys.argv[0], "fit", *arguments]  # where LightningCLI looks; it warns if arguments are handed over
    config = make_cli(PlanCLI, "plan").config["fit"]
    if config.context is not None and config.context < 2:
        raise ValueError(f"--context must be at least 2 (a prompt and a token), not {config.context}")
    capacity = None if config.memory is None else parse_bytes(config.memory)
    with keys_named(config):
        situation = read_situation(config, capacity=capacity, context=config.context)
    found = [] if situation.fits else suggestions(situation)
    estimate = deepspeed_estimate(situation)
    _print(situation, estimate, found)
    if config.json is not None:
        record = json.dumps(_record(situation, estimate, found), indent=1) + "\n"
        write_atomically(Path(config.json).expanduser(), record)
    return 0 if situation.fits else 1


def parse_bytes(text: str) -> int:
    """Bytes from a number with a unit: ``80GiB``, ``64 GB``, ``8e9``.

    Raises:
        ValueError: the text cannot be read.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise ValueError(f"--memory {text!r} is no amount of memory: give a number and a unit, as 80GiB or 64GB")
    return int(float(match[1]) * _UNITS[match[2]])


def deepspeed_estimate(situation: Situation) -> int | None:
    """DeepSpeed's own figure for model states on one device, in bytes; it has none for stages 0 and 1.

    It supposes 16-bit weights and Adam.
    """
    if situation.layout.stage not in (2, 3):
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as stage2

    model, layout = situation.model, situation.layout
    common = (layout.ranks_per_node, situation.nodes, layout.optimizer_place != "device")
    if layout.stage == 2:
        return int(stage2(model.parameters, *common)[1])
    return int(stage3(model.parameters, model.largest, *common, layout.parameter_place != "device")[1])


def model_states(plan: MemoryPlan) -> int:
    """The parts that DeepSpeed's figure is about: weights, gradients and optimizer state on the device, in bytes."""
    names = ("parameters", "gradients", "optimizer", "float32 gradients")
    return sum(part.bytes for part in plan.parts if part.name in names and part.place == "device")


# --- output -----------------------------------------------------------------------------------------------------------


def _print(situation: Situation, estimate: int | None, found: Sequence[Suggestion]) -> None:
    plan, layout, model = situation.plan, situation.layout, situation.model
    console = Console()
    say = partial(console.print, highlight=False, soft_wrap=True)
    unit, size = ("GiB", _GIB) if plan.peak >= 10 * _GIB else ("MiB", 1024**2)
    table = Table(title=f"Memory of each rank, {unit}", title_justify="left")
    for name in ("part", "where", *PHASES):
        table.add_column(name, justify="left" if name in ("part", "where") else "right")
    where = {"device": "GPU" if situation.gpu else "RAM", "host": "RAM", "disk": "NVMe"}
    for part in plan.parts:
        cells = (f"{part.bytes / size:,.1f}" if phase in part.phases else "" for phase in PHASES)
        table.add_row(part.name, where[part.place], *cells)
    table.add_section()
    totals = (f"{plan.total(phase) / size:,.1f}" for phase in PHASES)
    table.add_row("all on the device", where["device"], *totals, style="bold")
    say(
        f"{model.parameters / 1e6:,.1f} M parameters ({model.trainable / 1e6:,.1f} M trained), "
        f"{situation.strategy}{'' if layout.stage is None else f' stage {layout.stage}'}, "
        f"{_count(layout.ranks, 'rank')} on {_count(situation.nodes, 'node')}, "
        f"micro-batches of {situation.work.tokens} tokens, sequences of up to {situation.work.sequence_tokens}"
    )
    console.print(table)
    if situation.gpu:
        say(f"RAM of a node: {_gib(plan.host)}")
    say(f"At the start each rank loads the whole policy: {_gib(layout.ranks_per_node * situation.start)} of RAM a node")
    if estimate is not None:
        # as if devices had memory of their own, which is what DeepSpeed's figure is about
        mine = model_states(replace(situation, gpu=True).plan)
        say(f"Model states alone: {_gib(mine)}; DeepSpeed's own estimate (16-bit weights, Adam): {_gib(estimate)}")
    for note in situation.notes:
        say(f"Note: {note}")
    what = "each GPU" if situation.gpu else f"a node's RAM ({_count(layout.ranks_per_node, 'rank')})"
    say(
        f"{'fits' if situation.fits else 'does not fit'}: {_gib(situation.needed)} of {_gib(situation.capacity)} of "
        f"{what}, most of it in the {plan.peak_phase} phase",
        style="green" if situation.fits else "red",
    )
    for suggestion in found:
        say(f"  would fit with {suggestion.change} ({_gib(suggestion.needed)})")
    if not situation.fits and not found:
        say("  no change of strategy, nodes or micro-batch makes it fit: train adapters (model.policy.lora)")


def _record(situation: Situation, estimate: int | None, found: Sequence[Suggestion]) -> dict[str, Any]:
    plan = situation.plan
    return {
        "fits": situation.fits,
        "needed": situation.needed,
        "capacity": situation.capacity,
        "peak_phase": plan.peak_phase,
        "strategy": situation.strategy,
        "stage": situation.layout.stage,
        "ranks": situation.layout.ranks,
        "nodes": situation.nodes,
        "model": vars(situation.model),
        "work": vars(situation.work),
        "parts": [vars(part) for part in plan.parts],
        "totals": {phase: plan.total(phase) for phase in PHASES},
        "host_of_a_node": plan.host,
        "start_of_a_node": situation.layout.ranks_per_node * situation.start,
        "deepspeed_model_states": estimate,
        "notes": list(situation.notes),
        "suggestions": [vars(suggestion) for suggestion in found],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.2f} GiB"

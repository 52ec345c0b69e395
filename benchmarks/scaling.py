"""How memory and cost grow from 1 to 64 nodes of 8 GPUs, by the formulas of ``spear plan``; nothing is run.

    python benchmarks/scaling.py

Writes the tables to ``benchmarks/results/scaling`` and the picture to ``docs/images/scaling.png``. How good the
formulas are is measured by ``benchmarks/memory.py``; assumptions and what follows are in ``docs/scaling.md``.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring.costs import checkpoint_bytes, replica_messages, update_flops, update_messages
from transformers import AutoConfig, AutoModelForCausalLM

from spear_lightning.planning.memory import MemoryPlan, plan_memory, replay_bytes
from spear_lightning.planning.shape import Layout, Numbers, Workload
from spear_lightning.policy.flops import ModelShape, linear_weights, shape_of
from spear_lightning.utils.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[1]
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
CAPACITY = 80
GIB = 1024**3

# The published configurations (config.json of Qwen2.5-7B-Instruct and Qwen2.5-32B-Instruct), as far as shapes go.
MODELS = {
    "Qwen2.5-7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen2.5-32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
}
ROW, PROMPT, MICRO_BATCH, MICRO_BATCHES = 2560, 2048, 32768, 8
WORK = Workload(
    tokens=MICRO_BATCH,
    checkpointing=True,
    sequences=32,
    played=32,
    sequence_tokens=ROW,
    prompt_tokens=PROMPT,
    decoded=32,
    replay_entries=2048,
)
AUTOCAST = Numbers(weight=4, compute=2, residual=4, state=8, cast=2)
ZERO = Numbers(weight=2, compute=2, residual=2, master=4, state=8)


@dataclass(frozen=True)
class Setting:
    """A line of the picture, a column of the tables.

    Attributes:
        name: of the setting.
        numbers: bytes of each kind of number.
        layout: for a number of ranks.
        work: what goes through the model.
    """

    name: str
    numbers: Numbers
    layout: Callable[[int], Layout]
    work: Workload = WORK

    def plan(self, model: ModelShape, nodes: int) -> MemoryPlan:
        """Memory of a rank on so many nodes."""
        return plan_memory(model, self.numbers, self.layout(nodes * GPUS), self.work)


def _zero(stage: int, **more: Any) -> Callable[[int], Layout]:
    return lambda ranks: Layout(ranks, GPUS, stage, **more)


FEW = replace(WORK, sequences=8, played=8, decoded=8)

SETTINGS = (
    Setting("DDP", AUTOCAST, lambda ranks: Layout(ranks, GPUS, gradient_copy=True)),
    Setting("ZeRO-1", ZERO, _zero(1)),
    Setting("ZeRO-2", ZERO, _zero(2)),
    Setting("ZeRO-3", ZERO, _zero(3)),
    Setting("ZeRO-3, 8 episodes", ZERO, _zero(3), FEW),
    Setting("ZeRO-3, 8 episodes, optimizer in RAM", ZERO, _zero(3, optimizer_place="host"), FEW),
)


def model_of(settings: dict[str, int]) -> tuple[ModelShape, int]:
    """Shape of a model and the weights of its linear layers, found on the meta device."""
    config = AutoConfig.for_model("qwen2", vocab_size=152064, tie_word_embeddings=False, **settings)
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config)
    return shape_of(model), linear_weights(model)


def memory_table(model: ModelShape) -> list[str]:
    """GiB of a GPU by nodes and setting; bold is more than there is."""
    rows = [["nodes", "GPUs", *(setting.name for setting in SETTINGS)]]
    for nodes in NODES:
        cells = []
        for setting in SETTINGS:
            plan = setting.plan(model, nodes)
            amount = f"{plan.peak / GIB:.1f}"
            cells.append(f"{amount if plan.peak <= CAPACITY * GIB else f'**{amount}**'} {plan.peak_phase[0]}")
        rows.append([str(nodes), str(nodes * GPUS), *cells])
    return _table(rows)


def parts_table(model: ModelShape, setting: Setting) -> list[str]:
    """GiB of each part over nodes."""
    plans = [setting.plan(model, nodes) for nodes in NODES]
    rows = [["part", "held in", *map(str, NODES)]]
    for part in plans[0].parts:
        cells = [f"{plan.bytes_of(part.name) / GIB:.2f}" for plan in plans]
        place = {"device": "GPU", "host": "RAM", "disk": "NVMe"}[part.place]
        phases = "all" if len(part.phases) == 3 else ", ".join(part.phases)
        rows.append([part.name, f"{place}: {phases}", *cells])
    return _table(rows)


def cost_table(model: ModelShape, matrices: int) -> list[str]:
    """What an update computes, sends and writes; none of it but the last line depends on the nodes."""
    tokens = MICRO_BATCH
    plain, recomputed = (update_flops(model, matrices, tokens, ROW, again) / tokens / 1e9 for again in (False, True))
    attention = 12 * model.layers * model.queries * ROW / 1e9
    rows = [["quantity", "value"]]
    rows.append(["parameters Ψ", f"{model.parameters / 1e9:.3f} · 10⁹"])
    rows.append(["operations of an update per token, GFLOP", f"{plain:.1f}"])
    rows.append(["of these attention, in rows of 2560", f"{attention:.1f}"])
    rows.append(["with gradient checkpointing", f"{recomputed:.1f}"])
    for setting in SETTINGS[:4]:
        sent = update_messages(model, setting.numbers, setting.layout(GPUS), MICRO_BATCHES)
        rows.append([f"messages of an update, {setting.name}, GB per GPU", f"{sent / 1e9:.1f}"])
    replica = replica_messages(model, ZERO, Layout(GPUS, GPUS, 3))
    rows.append(["messages of the replica, ZeRO-3, GB per GPU and iteration", f"{replica / 1e9:.1f}"])
    for name, setting in (("DDP", SETTINGS[0]), ("ZeRO-1 and 2", SETTINGS[1]), ("ZeRO-3", SETTINGS[3])):
        size = checkpoint_bytes(model, setting.numbers, setting.layout(GPUS)) / 1e9
        rows.append([f"checkpoint, {name}, GB", f"{size:.0f}"])
    rows.append(["replay of 2048 rows of 2560 tokens, MB, all ranks together", f"{replay_bytes(2048, ROW) / 1e6:.0f}"])
    start = GPUS * 4 * model.parameters / GIB
    rows.append(["RAM of a node at the start (each rank loads float32 weights), GiB", f"{start:.0f}"])
    for nodes in (1, 8):
        host = SETTINGS[-1].plan(model, nodes).host / GIB
        rows.append([f"RAM of a node with the optimizer in it, {nodes} node{'s' * (nodes > 1)}, GiB", f"{host:.0f}"])
    return _table(rows)


def draw(models: dict[str, ModelShape]) -> bytes:
    """Memory of a GPU over nodes, a panel for each model; a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = ("#000000", "#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, model) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        axes.axhline(CAPACITY, color="#888888", linestyle="--", linewidth=1.2, label=f"{CAPACITY} GiB")
        for setting, colour, marker in zip(SETTINGS, colours, "osD^vP", strict=True):
            peaks = [setting.plan(model, nodes).peak / GIB for nodes in NODES]
            axes.plot(NODES, peaks, color=colour, marker=marker, markersize=5, linewidth=1.5, label=setting.name)
        axes.set(title=name, xlabel="nodes of 8 GPUs", xscale="log", yscale="log")
        axes.set_xticks(NODES, [str(nodes) for nodes in NODES])
        axes.minorticks_off()
        ticks = [10, 20, 40, 80, 160, 320, 640, 1280]
        low, high = axes.get_ylim()
        shown = [tick for tick in ticks if low <= tick <= high]
        axes.set_yticks(shown, [str(tick) for tick in shown])
        axes.grid(axis="y", alpha=0.25)
    figure.axes[0].set_ylabel("GiB of a GPU, in the phase that needs most")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write tables and picture.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling", help="folder of the tables")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/scaling.png", help="file of the picture")
    given = parser.parse_args(arguments)
    models = {name: model_of(settings) for name, settings in MODELS.items()}
    lines = [
        "# Memory and cost from 1 to 64 nodes, by formula",
        "",
        "Nothing here was run; docs/scaling.md says what is assumed. GiB of a GPU, and the phase that needs it: "
        "g(eneration), b(ackward), s(tep). Bold is more than 80.",
    ]
    record: dict[str, Any] = {"work": asdict(WORK), "nodes": NODES, "models": {}}
    for name, (model, matrices) in models.items():
        lines += ["", f"## {name}", "", *memory_table(model), "", "ZeRO-3 by part, GiB:", ""]
        lines += [*parts_table(model, SETTINGS[3]), "", *cost_table(model, matrices)]
        record["models"][name] = {
            "shape": asdict(model),
            "linear_weights": matrices,
            "peaks": {s.name: [s.plan(model, nodes).peak for nodes in NODES] for s in SETTINGS},
            "node_ram": {s.name: [s.plan(model, nodes).host for nodes in NODES] for s in SETTINGS},
        }
    write_atomically(given.output / "scaling.md", "\n".join(lines) + "\n")
    write_atomically(given.output / "scaling.json", json.dumps(record, indent=1) + "\n")
    write_atomically(given.picture, draw({name: model for name, (model, _) in models.items()}))
    print(f"written to {given.output} and {given.picture}")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body)]


if __name__ == "__main__":
    main()

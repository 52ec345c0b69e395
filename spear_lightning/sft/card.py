"""The model card that supervised fine-tuning writes beside its weights."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from spear_lightning.sft.evaluation import Score
from spear_lightning.utils.atomic import write_atomically

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [spear-lightning, behaviour-cloning]
---
# {name}

A small causal language model, cloned from demonstrations. It is where reinforcement learning starts from, not an end.

| held-out tasks (never demonstrated) | success | 95 % interval | games | turns without an action | refused actions |
|---|---|---|---|---|---|
{rows}

By task type, at temperature {temperature}: {by_type}.

- Made by: `{command}`, seed {seed}
- Demonstrations: {demonstrations}
- Model: {architecture}, {parameters:,} parameters, float32, vocabulary of {vocabulary}
- Time: {seconds}
- Machine: {machine}; Python {python}, torch {torch}, transformers {transformers}
"""


@dataclass(frozen=True)
class SFTResult:
    """Result of supervised fine-tuning.

    Attributes:
        folder: the Hugging Face folder that was written.
        scores: held-out results, one per temperature.
        demonstrations: what was learned from, in words.
        seconds: wall-clock by phase.
    """

    folder: Path
    scores: list[Score]
    demonstrations: str
    seconds: dict[str, float]


def machine() -> str:
    """Processor and number of cores, for people."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", info.read_text(encoding="utf-8") if info.exists() else "", re.MULTILINE)
    model = named[1] if named else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def write_card(
    result: SFTResult, name: str, command: str, seed: int, network: PreTrainedModel, vocabulary: int
) -> None:
    """Write ``README.md`` (for people) and ``scores.json`` (for programs) into a policy's folder."""
    percent = "{:.1%}".format
    rows = [
        f"| temperature {score.temperature:g} | {percent(score.success.share)} | "
        f"{' to '.join(map(percent, score.success.interval()))} | {score.success.episodes} | "
        f"{percent(score.unparsable)} | {percent(score.refused)} |"
        for score in result.scores
    ]
    first = result.scores[0] if result.scores else None
    text = _CARD.format(
        name=name,
        rows="\n".join(rows) or "| not measured | | | | | |",
        temperature=f"{first.temperature:g}" if first else "-",
        by_type=", ".join(f"{kind} {percent(rate.share)}" for kind, rate in first.by_type.items())
        if first
        else "not measured",
        command=command,
        seed=seed,
        demonstrations=result.demonstrations,
        architecture=network.config.model_type,
        parameters=network.num_parameters(),
        vocabulary=vocabulary,
        seconds=", ".join(f"{phase} {value:.0f} s" for phase, value in result.seconds.items()),
        machine=machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    write_atomically(result.folder / "README.md", text)
    scores = [
        asdict(score)
        | {"success": score.success._asdict(), "by_type": {k: v._asdict() for k, v in score.by_type.items()}}
        for score in result.scores
    ]
    write_atomically(result.folder / "scores.json", json.dumps(scores, indent=1) + "\n")

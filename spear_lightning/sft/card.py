"""The model card that a warm start writes beside its weights."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from spear_lightning.sft.demonstrations import Transcript
from spear_lightning.utils.atomic import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spear_lightning.sft.evaluation import Score

_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [alfworld, spear-lightning, behaviour-cloning]
---
# {name}

A small causal language model that plays household text games (ALFWorld), cloned from a scripted search expert that
reads only the text. It is where reinforcement learning starts from, not an end.

| held-out games (never demonstrated) | success | 95 % interval | games | turns without an action | refused actions |
|---|---|---|---|---|---|
{rows}

By task type, at temperature {temperature}: {by_kind}.

- Made by: `{command}`, seed {seed}
- Demonstrations: {demonstrations} won games of the search expert, {steps:.1f} moves on average
- Model: {architecture}, {parameters:,} parameters, float32, vocabulary of {vocabulary}
- Time: {seconds}
- Machine: {machine}; Python {python}, torch {torch}, transformers {transformers}

Context: `<task> … <obs> … <action> go to desk 1 </action> <obs> …`; the model writes from `<action>` to `</action>`.
"""


def machine() -> str:
    """Processor and number of cores, for people."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def write_card(
    folder: Path,
    name: str,
    scores: Sequence[Score],
    seconds: dict[str, float],
    transcripts: Sequence[Transcript],
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    command: str,
) -> None:
    """Write ``README.md`` (for people) and ``scores.json`` (for programs) into a policy's folder."""
    percent = "{:.1%}".format
    rows = [
        f"| temperature {score.temperature:g} | {percent(score.success)} | {percent(score.interval[0])} to "
        f"{percent(score.interval[1])} | {score.episodes} | {percent(score.void)} | {percent(score.refused)} |"
        for score in scores
    ]
    by_kind = (
        ", ".join(f"{kind} {percent(share)}" for kind, share in scores[0].by_kind.items()) if scores else "not measured"
    )
    text = _CARD.format(
        name=name,
        rows="\n".join(rows) or "| not measured | | | | | |",
        temperature=f"{scores[0].temperature:g}" if scores else "-",
        by_kind=by_kind,
        command=command,
        seed=seed,
        demonstrations=len(transcripts),
        steps=sum(len(t.steps) for t in transcripts) / len(transcripts),
        architecture=network.config.model_type,
        parameters=network.num_parameters(),
        vocabulary=len(tokenizer),
        seconds=", ".join(f"{phase} {value:.0f} s" for phase, value in seconds.items()),
        machine=machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    write_atomically(folder / "README.md", text)
    write_atomically(folder / "scores.json", json.dumps([asdict(score) for score in scores], indent=1) + "\n")

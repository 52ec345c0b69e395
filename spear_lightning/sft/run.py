"""``spear sft``: from nothing to a small policy that has begun to know its tasks (supervised fine-tuning).

Demonstrations are collected, a tokenizer is built from them, a fresh model clones them, and the result is written as a
Hugging Face folder together with what it scores on held-out games. Reinforcement learning starts from there::

    spear sft -c configs/sft/alfworld.yaml --output runs/sft-alfworld
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser
from transformers.utils.logging import disable_progress_bar

from spear_lightning.environments.base import TaskSuite
from spear_lightning.policy.loading import fresh_model
from spear_lightning.sft.card import SFTResult, write_card
from spear_lightning.sft.dagger import Dagger, play_dagger
from spear_lightning.sft.demonstrations import Demonstrations, ExpertDemonstrations
from spear_lightning.sft.evaluation import HeldOut, evaluate
from spear_lightning.sft.initialization import compose_name_embeddings
from spear_lightning.sft.math import WrittenSolutions  # noqa: F401 - can be named in YAML without its module
from spear_lightning.sft.module import Optimization, fit_samples
from spear_lightning.sft.tokenizer import build_tokenizer
from spear_lightning.utils.randomness import stream_seed

_MODEL = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "max_position_embeddings": 4096,
}


def sft(
    environment: TaskSuite,
    output: str,
    demonstrations: Demonstrations = ExpertDemonstrations(),  # noqa: B008 - frozen
    model: dict[str, Any] | None = None,
    optimization: Optimization = Optimization(),  # noqa: B008 - frozen
    dagger: Dagger = Dagger(),  # noqa: B008 - frozen
    held_out: HeldOut = HeldOut(),  # noqa: B008 - frozen
    workers: int = 2,
    threads: int = 2,
    seed: int = 0,
    name: str = "spear-sft",
    command: str = "spear sft",
) -> SFTResult:
    """Clone demonstrations into a fresh model and write a Hugging Face folder.

    Args:
        environment: its training tasks are demonstrated, its validation tasks show the result. They must be other tasks
            than those of the reinforcement learning that follows (give them seeds of their own).
        output: folder to write; made if absent, files of an earlier result in it are replaced.
        demonstrations: what is learned from.
        model: Hugging Face configuration of the fresh model: ``model_type`` and that type's own keys. The vocabulary is
            the tokenizer's.
        optimization: how the model is fitted.
        dagger: games that the policy plays with the expert beside it, learned after the demonstrations.
        held_out: how the result is measured.
        workers: processes that play.
        threads: of torch in this process.
        seed: of everything random.
        name: of the policy, for its card.
        command: that makes the policy, for its card.

    Returns:
        Where it is and what it scores.

    Raises:
        ValueError: settings or data cannot be used; the message names the key and the fix.
    """
    for key, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{key} must be at least 1, not {value}")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {output} exists and is not a folder.")
    if dagger.rounds and not (isinstance(demonstrations, ExpertDemonstrations) and demonstrations.agent is None):
        raise ValueError(
            "dagger.rounds: only an expert of ExpertDemonstrations can play beside the policy, and only as a "
            "TranscriptAgent; set it to 0"
        )
    model = model or _MODEL
    # Tried with a tokenizer of one word, so that a wrong key is found now and not after minutes of playing.
    fresh_model(model, build_tokenizer(["word word"]), "model", dtype=torch.float32, attention="sdpa", seed=seed)
    torch.set_num_threads(threads)
    began, seconds = time.perf_counter(), dict[str, float]()

    def lap(phase: str) -> None:
        seconds[phase] = time.perf_counter() - began - sum(seconds.values())

    environment.prepare()
    tasks = environment.tasks("train")
    _tell(f"collecting demonstrations of {len(tasks)} tasks")
    shown = demonstrations.collect(environment, workers=workers, seed=seed)
    lap("demonstrations")

    tokenizer = demonstrations.build_tokenizer(text for demonstration in shown for text in demonstration.texts())
    network = fresh_model(model, tokenizer, "model", dtype=torch.float32, attention="sdpa", seed=seed)
    compose_name_embeddings(network, tokenizer)
    agent = demonstrations.make_agent()
    agent.bind(tokenizer)
    apart = set(tasks[:: max(2, round(1 / demonstrations.validation))])
    train = [sample for each in shown if each.task not in apart for sample in demonstrations.encode(each, agent)]
    validation = [sample for each in shown if each.task in apart for sample in demonstrations.encode(each, agent)]
    if not train:
        raise ValueError(f"environment: {len(tasks)} training tasks are too few to learn from")
    _tell(f"fitting {network.num_parameters():,} parameters to {len(train)} samples, {optimization.epochs} epochs")
    fit_samples(network, train, validation, optimization, seed)
    for number in range(dagger.rounds):
        assert isinstance(demonstrations, ExpertDemonstrations)
        train += play_dagger(
            *(network, tokenizer, environment, [task for task in tasks if task not in apart], dagger, demonstrations),
            seed=stream_seed("coaching", seed, number),
            max_response_tokens=held_out.max_response_tokens,
            workers=workers,
        )
        again = replace(optimization, epochs=dagger.epochs, learning_rate=dagger.learning_rate)
        fit_samples(network, train, validation, again, stream_seed("refit", seed, number))
    lap("training")

    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _tell(f"playing {len(environment.tasks('validation'))} held-out tasks")
    scores = evaluate(environment, folder, held_out, demonstrations.make_agent(), workers=workers, seed=seed)
    lap("evaluation")
    result = SFTResult(folder, scores, demonstrations.describe(shown), seconds)
    write_card(result, name, command, seed, network, len(tokenizer))
    return result


def _tell(what: str) -> None:
    """Say what the next minutes are spent on; a log file has no progress bars."""
    print(f"[{time.strftime('%H:%M:%S')}] sft: {what}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: every argument of :func:`sft` is a key of the YAML file and an option.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parser = ArgumentParser(prog="spear sft", description="Clone demonstrations into a small policy to start from.")
    parser.add_argument(
        "-c", "--config", action="config", help="YAML file; may be given several times, later ones win."
    )
    parser.add_function_arguments(sft)
    settings = parser.parse_args(None if arguments is None else list(arguments))
    settings.pop("config", None)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    cast(Any, disable_progress_bar)()  # of loading and saving, which take milliseconds here
    with warnings.catch_warnings():
        # newer versions call it `instantiate`, older know only this
        warnings.simplefilter("ignore", DeprecationWarning)
        objects = parser.instantiate_classes(settings)
    result = sft(**objects.as_dict())
    for score in result.scores:
        print(score)
    phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    print(f"{result.demonstrations}; {phases}; written to {result.folder}")

"""``spear warmstart``: from nothing to a small policy that has begun to know the game.

An expert plays generated games, a tokenizer is built from its transcripts, a fresh model clones them, and the
result is written as a Hugging Face folder together with what it scores on held-out games. Reinforcement learning starts
from there::

    spear warmstart -c configs/warmstart.yaml --output runs/warmstart
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.base import Task, TaskSuite
from spear_lightning.environments.expert import DemonstrationNoise, Expert
from spear_lightning.policy.loading import fresh_model
from spear_lightning.sft.card import write_card
from spear_lightning.sft.command import run_command
from spear_lightning.sft.dagger import Coaching, play_coached
from spear_lightning.sft.demonstrations import TokenRow, Transcript, encode_transcript, play_demonstrations
from spear_lightning.sft.evaluation import HeldOut, Score, evaluate
from spear_lightning.sft.initialization import compose_name_embeddings
from spear_lightning.sft.module import Optimization, fit_rows
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


@dataclass(frozen=True)
class Demonstrations:
    """What the expert plays.

    Args:
        expert: class that plays.
        repetitions: transcripts per training game of the environment, each with other choices.
        max_steps: most actions of a demonstration; it may be more than the policy will have. Games that are not won by
            then are left out.
        wandering: how far demonstrations stray from the shortest search.
        learn_straying: also learn the moves that strayed; otherwise they are context only. The policy
            then wastes moves of its own, which reinforcement learning can unlearn.
        validation: share of the games whose demonstrations are only used for the validation loss.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    expert: type[Expert] = SearchExpert
    repetitions: int = 2
    max_steps: int = 50
    wandering: DemonstrationNoise = field(
        default_factory=lambda: DemonstrationNoise(detour=0.1, waste=0.05, blunder=0.03, fumble=0.05)
    )
    learn_straying: bool = False
    validation: float = 0.04

    def __post_init__(self) -> None:
        for name in ("repetitions", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"demonstrations.{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.validation < 1:
            raise ValueError(f"demonstrations.validation must be between 0 and 1, got {self.validation}.")


@dataclass(frozen=True)
class WarmstartResult:
    """What a warm start brought.

    Attributes:
        folder: the Hugging Face folder that was written.
        scores: held-out results, one per temperature.
        demonstrations: how many were learned from.
        seconds: wall-clock by phase.
    """

    folder: Path
    scores: list[Score]
    demonstrations: int
    seconds: dict[str, float]


def warmstart(
    environment: TaskSuite,
    output: str,
    demonstrations: Demonstrations = Demonstrations(),
    model: dict[str, Any] | None = None,
    optimization: Optimization = Optimization(),  # noqa: B008 - frozen
    coaching: Coaching = Coaching(),  # noqa: B008 - frozen
    held_out: HeldOut = HeldOut(),  # noqa: B008 - frozen
    compose_names: bool = True,
    workers: int = 2,
    threads: int = 2,
    seed: int = 0,
    name: str = "spear-warmstart",
    command: str = "spear warmstart",
) -> WarmstartResult:
    """Clone an expert into a fresh model and write a Hugging Face folder.

    Args:
        environment: its training games are demonstrated, its validation games show the result. They must be other
            games than those of the reinforcement learning that follows (give it its own ``train_seed``).
        output: folder to write; made if absent, files of an earlier result in it are replaced.
        demonstrations: what the expert plays.
        model: Hugging Face configuration of the fresh model: ``model_type`` and that type's own keys. The vocabulary is
            the tokenizer's.
        optimization: how the model is fitted.
        coaching: games that the policy plays with the expert beside it, learned after the demonstrations.
        held_out: how the result is measured.
        compose_names: start embeddings of names ("desk 1") as mixtures of noun and number.
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
            raise ValueError(f"{key} must be at least 1, got {value}.")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {output} exists and is not a folder.")
    model = model or _MODEL
    # Tried with a tokenizer of one word, so that a wrong key is found now and not after minutes of playing.
    fresh_model(model, build_tokenizer(["word word"]), "model", dtype=torch.float32, attention="sdpa", seed=seed)
    torch.set_num_threads(threads)
    clock = _Clock()

    environment.prepare()
    _tell(f"the expert plays {len(environment.tasks('train')) * demonstrations.repetitions} games")
    transcripts = _demonstrate(environment, demonstrations, workers, seed)
    clock.lap("demonstrations")

    texts = (text for transcript in transcripts for text in transcript.texts())
    tokenizer = build_tokenizer(texts, phrases=demonstrations.expert.phrases, names=demonstrations.expert.names)
    network = fresh_model(model, tokenizer, "model", dtype=torch.float32, attention="sdpa", seed=seed)
    if compose_names:
        compose_name_embeddings(network, tokenizer)
    tasks = environment.tasks("train")
    apart = set(tasks[:: max(2, round(1 / demonstrations.validation))])
    train, validation = _split(transcripts, apart, tokenizer, demonstrations)
    _tell(
        f"fitting {network.num_parameters():,} parameters to {len(train)} demonstrations, {optimization.epochs} epochs"
    )
    fit_rows(network, train, validation, optimization, seed)
    for number in range(coaching.rounds):
        train += play_coached(
            *(network, tokenizer, environment, [task for task in tasks if task not in apart], coaching),
            seed=stream_seed("coaching", seed, number),
            max_response_tokens=held_out.max_response_tokens,
            wandering=demonstrations.wandering,
            workers=workers,
            expert=demonstrations.expert,
        )
        again = replace(optimization, epochs=coaching.epochs, learning_rate=coaching.learning_rate)
        fit_rows(network, train, validation, again, stream_seed("refit", seed, number))
    clock.lap("training")

    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _tell(f"playing {len(environment.tasks('validation'))} held-out games")
    scores = evaluate(environment, folder, held_out, workers=workers, seed=seed)
    clock.lap("evaluation")
    result = WarmstartResult(folder, scores, len(transcripts), clock.laps)
    write_card(folder, name, result.scores, result.seconds, transcripts, network, tokenizer, seed, command)
    return result


def _tell(what: str) -> None:
    """Say what the next minutes are spent on; a log file has no progress bars."""
    print(f"[{time.strftime('%H:%M:%S')}] warm start: {what}", file=sys.stderr, flush=True)


def _demonstrate(suite: TaskSuite, settings: Demonstrations, workers: int, seed: int) -> list[Transcript]:
    played = play_demonstrations(
        suite,
        suite.tasks("train"),
        seed=seed,
        wandering=settings.wandering,
        repetitions=settings.repetitions,
        max_steps=settings.max_steps,
        workers=workers,
        expert=settings.expert,
    )
    won = [transcript for transcript in played if transcript.success]
    if len(won) < 2:
        raise ValueError(
            f"The expert won {len(won)} of {len(played)} games within demonstrations.max_steps={settings.max_steps}: "
            "there is nothing to learn from. Allow more steps or give environment more training games."
        )
    return won


def _split(
    transcripts: Sequence[Transcript],
    apart: Collection[Task],
    tokenizer: PreTrainedTokenizerBase,
    settings: Demonstrations,
) -> tuple[list[TokenRow], list[TokenRow]]:
    """Rows to learn from, and rows of games that are kept apart for the validation loss."""
    agent = TranscriptAgent()
    agent.bind(tokenizer)
    parts: tuple[list[TokenRow], list[TokenRow]] = ([], [])
    for transcript in transcripts:
        row = encode_transcript(transcript, agent, learn_straying=settings.learn_straying)
        parts[transcript.task in apart].append(row)
    return parts


class _Clock:
    """Wall-clock of the phases of a run."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._last = now, now()
        self.laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to ``phase``."""
        now = self._now()
        self.laps[phase], self._last = now - self._last, now


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the warm start: every argument of :func:`warmstart` is a key of the YAML file and an option.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    result = run_command(
        warmstart, "spear warmstart", "Clone a scripted expert into a small policy to start from.", arguments
    )
    console = Console()
    for score in result.scores:
        console.print(str(score))
    phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    console.print(f"{result.demonstrations} demonstrations; {phases}; written to {result.folder}")


if __name__ == "__main__":
    main()

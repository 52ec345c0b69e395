"""Demonstrations: an expert plays on the real engine, and its transcripts become token rows.

Games are played in worker processes (the engine is never loaded in the caller). What is played depends only on the
seed, the task and the repetition, not on the number of workers.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gymnasium
import numpy as np
import numpy.typing as npt

from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.base import Task, TaskSuite
from spear_lightning.environments.expert import DemonstrationNoise, Expert, Motive
from spear_lightning.utils.randomness import stream_seed

if TYPE_CHECKING:  # workers import this module and need none of it
    from spear_lightning.agents.transcript import TranscriptAgent


@dataclass(frozen=True, slots=True)
class Step:
    """One move of the expert.

    Attributes:
        observation: what it answered to.
        action: what it did.
        motive: why.
    """

    observation: str
    action: str
    motive: Motive


@dataclass(frozen=True, slots=True)
class Transcript:
    """One game as the expert played it.

    Attributes:
        task: that was played.
        instruction: the task in words.
        steps: in order.
        success: whether it was solved.
        refused: number of actions that the engine answered with "Nothing happens."
    """

    task: Task
    instruction: str
    steps: tuple[Step, ...]
    success: bool
    refused: int

    def texts(self) -> Iterator[str]:
        """Everything that was read or written, for a tokenizer to be built from."""
        yield self.instruction
        for step in self.steps:
            yield step.observation
            yield step.action


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One transcript as tokens.

    Attributes:
        ids: token ids, int32 ``(tokens,)``.
        mask: true at the tokens to be learned: the expert's actions, int8-sized bools ``(tokens,)``.
    """

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


def play_transcript(environment: gymnasium.Env[str, str], task: Task, expert: Expert, max_steps: int) -> Transcript:
    """Let ``expert`` play ``task`` to its end or to ``max_steps`` actions."""
    observation, info = environment.reset(seed=task.seed, options={"task": task.id})
    instruction = str(info["task"])
    expert.reset(instruction, observation)
    steps: list[Step] = []
    won, refused = False, 0
    text = observation
    while len(steps) < max_steps:
        action = expert.act(text)
        steps.append(Step(text, action, expert.motive))
        text, _, terminated, truncated, info = environment.step(action)
        refused += text.lower().startswith("nothing happens")
        won = bool(info.get("won", False))
        if terminated or truncated:
            break
    return Transcript(task, instruction, tuple(steps), won, refused)


def play_demonstrations(
    suite: TaskSuite,
    tasks: Sequence[Task],
    *,
    seed: int,
    wandering: DemonstrationNoise = DemonstrationNoise(),  # noqa: B008 - frozen
    repetitions: int = 1,
    max_steps: int = 50,
    workers: int = 1,
    expert: type[Expert] = SearchExpert,
) -> list[Transcript]:
    """Play every task ``repetitions`` times.

    Args:
        suite: makes the environments (in the workers).
        tasks: to be played.
        seed: of the expert's choices.
        wandering: how far it strays.
        repetitions: transcripts per task, each with other choices.
        max_steps: most actions in a game.
        workers: processes; 0 plays in this process.
        expert: that plays.

    Returns:
        All transcripts, successful or not, in order of task and repetition.
    """
    if workers == 0:
        return _play_chunk(suite, tasks, seed, wandering, repetitions, max_steps, expert)
    # Contiguous chunks: repetitions of a game stay in one worker, which loads it once.
    chunks = [list(part) for part in np.array_split(np.arange(len(tasks)), max(1, min(4 * workers, len(tasks))))]
    # spawn: a forked child of a process that runs torch threads may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [
            pool.submit(_play_chunk, suite, [tasks[i] for i in chunk], seed, wandering, repetitions, max_steps, expert)
            for chunk in chunks
        ]
        return [transcript for part in parts for transcript in part.result()]


def _play_chunk(
    suite: TaskSuite,
    tasks: Sequence[Task],
    seed: int,
    wandering: DemonstrationNoise,
    repetitions: int,
    max_steps: int,
    expert: type[Expert],
) -> list[Transcript]:
    environment = suite.make()
    try:
        return [
            play_transcript(
                environment,
                task,
                expert(stream_seed("demonstration", seed, task.id, repetition), wandering),
                max_steps,
            )
            for task in tasks
            for repetition in range(repetitions)
        ]
    finally:
        environment.close()


def encode_transcript(transcript: Transcript, agent: TranscriptAgent, *, learn_straying: bool) -> TokenRow:
    """Make the token row that the policy's own context would be, had it played this game.

    Args:
        transcript: to encode.
        agent: bound to the tokenizer; the one that will play with the policy.
        learn_straying: also learn the moves that strayed; otherwise they are context only. Actions that the engine
            was meant to refuse are never learned.
    """
    learned = {"purpose", "stray"} if learn_straying else {"purpose"}
    pieces: list[tuple[npt.NDArray[np.int32], bool]] = []
    for number, step in enumerate(transcript.steps):
        first = number == 0
        prompt = (
            agent.opening_ids(transcript.instruction, step.observation)
            if first
            else agent.continuation_ids(step.observation)
        )
        pieces += [(prompt, False), (agent.response_ids(step.action), step.motive in learned)]
    return TokenRow(
        np.concatenate([ids for ids, _ in pieces]).astype(np.int32),
        np.concatenate([np.full(len(ids), learned) for ids, learned in pieces]),
    )

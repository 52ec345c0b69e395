"""Demonstrations: where they come from, how they are spelled, and those that a scripted expert plays.

Games are played in worker processes (the engine is never loaded in the caller). What is played depends only on the
seed, the task and the repetition, not on the number of workers.
"""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import gymnasium
import numpy as np
from annotated_types import Gt, Lt
from typing_extensions import override

from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.base import Observation, Task, TaskSuite
from spear_lightning.environments.expert import DemonstrationNoise, Expert, Motive
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import Positive, in_range

if TYPE_CHECKING:  # workers import this module and need none of it
    from transformers import PreTrainedTokenizerBase

    from spear_lightning.agents.base import Agent, AgentSession
    from spear_lightning.data.samples import Sample


class Demonstrations(ABC):
    """What a policy is cloned from.

    Attributes:
        validation: share of the tasks whose demonstrations are only used for the validation loss.
    """

    validation: float = 0.04

    @abstractmethod
    def collect(self, suite: TaskSuite, *, workers: int, seed: int) -> Sequence[Any]:
        """Demonstrations of the training tasks; each has a ``task`` and ``texts()``.

        Args:
            suite: that is prepared.
            workers: processes.
            seed: of all choices.

        Raises:
            ValueError: the tasks cannot be demonstrated.
        """

    @abstractmethod
    def build_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """A tokenizer for everything that is read or written."""

    @abstractmethod
    def make_agent(self) -> Agent:
        """The agent that will play with the policy."""

    @abstractmethod
    def encode(self, demonstration: Any, agent: Any) -> list[Sample]:
        """The samples that reinforcement learning would make of it, had the policy acted this way.

        Args:
            demonstration: to encode.
            agent: of :meth:`make_agent`, bound to the tokenizer.
        """

    @abstractmethod
    def describe(self, demonstrations: Sequence[Any]) -> str:
        """What they are, for the model card."""


@dataclass(frozen=True, slots=True)
class Step:
    """One move of the expert.

    Attributes:
        observation: what it answered to.
        action: what it did.
        motive: why.
        admissible: actions that the environment would have accepted, where it tells.
    """

    observation: str
    action: str
    motive: Motive
    admissible: tuple[str, ...] = ()


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


@in_range
@dataclass(frozen=True)
class ExpertDemonstrations(Demonstrations):
    """Games that a scripted expert plays.

    Args:
        agent: that will play with the policy, and writes the prompts that it learns from: a ``StepwiseAgent`` or a
            ``TranscriptAgent``, which ``None`` is.
        expert: class that plays.
        repetitions: transcripts per training game of the environment, each with other choices.
        max_steps: most actions of a demonstration; it may be more than the policy will have. Games that are not won by
            then are left out.
        noise: how far demonstrations stray from the shortest search.
        learn_noise: also learn the moves that strayed; otherwise they are context only. The policy then wastes moves of
            its own, which reinforcement learning can unlearn. Actions that the engine was meant to refuse are never
            learned.
        validation: share of the games whose demonstrations are only used for the validation loss.

    Raises:
        ValueError: a number is out of range, or the agent needs a chat template.
    """

    expert: type[Expert] = SearchExpert
    repetitions: Positive = 2
    max_steps: Positive = 50
    noise: DemonstrationNoise = field(
        default_factory=lambda: DemonstrationNoise(detour=0.1, waste=0.05, mistake=0.03, invalid=0.05)
    )
    learn_noise: bool = False
    validation: Annotated[float, Gt(0), Lt(1)] = 0.04
    agent: Agent | None = None

    def __post_init__(self) -> None:
        if self.agent is None:
            return
        from spear_lightning.agents.stepwise import StepwiseAgent
        from spear_lightning.agents.transcript import TranscriptAgent

        if not isinstance(self.agent, StepwiseAgent | TranscriptAgent):
            raise ValueError(
                f"demonstrations.agent must be a StepwiseAgent or a TranscriptAgent, not {type(self.agent).__name__}: "
                "the tokenizer that is made here has no chat template"
            )

    @override
    def collect(self, suite: TaskSuite, *, workers: int, seed: int) -> list[Transcript]:
        played = self.play(suite, suite.tasks("train"), workers=workers, seed=seed)
        won = [transcript for transcript in played if transcript.success]
        if len(won) < 2:
            raise ValueError(
                f"The expert won {len(won)} of {len(played)} games within demonstrations.max_steps={self.max_steps}: "
                "there is nothing to learn from. Allow more steps or give environment more training games."
            )
        return won

    def play(self, suite: TaskSuite, tasks: Sequence[Task], *, workers: int, seed: int) -> list[Transcript]:
        """Play tasks.

        Args:
            suite: makes the environments (in the workers).
            tasks: to be played.
            workers: processes; 0 plays in this process.
            seed: of the expert's choices.

        Returns:
            All transcripts, successful or not, in order of task and repetition.
        """
        if workers == 0:
            return self._play_chunk(suite, tasks, seed)
        # Contiguous chunks: repetitions of a game stay in one worker, which loads it once.
        chunks = [list(part) for part in np.array_split(np.arange(len(tasks)), max(1, min(4 * workers, len(tasks))))]
        # spawn: a forked child of a process that runs torch threads may hang.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(self._play_chunk, suite, [tasks[i] for i in chunk], seed) for chunk in chunks]
            return [transcript for part in parts for transcript in part.result()]

    def _play_chunk(self, suite: TaskSuite, tasks: Sequence[Task], seed: int) -> list[Transcript]:
        with closing(suite.make()) as environment:
            return [
                play_transcript(
                    environment,
                    task,
                    self.expert(stream_seed("demonstration", seed, task.id, repetition), self.noise),
                    self.max_steps,
                )
                for task in tasks
                for repetition in range(self.repetitions)
            ]

    @override
    def build_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        from spear_lightning.sft.tokenizer import build_tokenizer

        said = self.make_agent().phrases
        return build_tokenizer([*texts, *said, *said], phrases=[*self.expert.phrases, *said], names=self.expert.names)

    @override
    def make_agent(self) -> Agent:
        from spear_lightning.agents.transcript import TranscriptAgent

        return TranscriptAgent() if self.agent is None else self.agent

    @override
    def encode(self, demonstration: Transcript, agent: Agent) -> list[Sample]:
        from spear_lightning.sft.module import sample_of

        learned = {"purpose", "stray"} if self.learn_noise else {"purpose"}
        turns = []
        session: AgentSession | None = None
        for step in demonstration.steps:
            observation = Observation(step.observation, step.admissible, task=demonstration.instruction)
            if session is None:
                session = agent.start(demonstration.task, observation)
            else:
                session.observe(observation)
            prompt, response = session.prompt(), agent.response_ids(step.action)
            session.respond(response)
            turns.append([(prompt.appended, False), (response, step.motive in learned)])
        samples = turns if agent.context == "stepwise" else [[piece for turn in turns for piece in turn]]
        return [sample for sample in map(sample_of, samples) if sample.mask.any()]

    @override
    def describe(self, demonstrations: Sequence[Transcript]) -> str:
        moves = sum(len(transcript.steps) for transcript in demonstrations) / len(demonstrations)
        return f"{len(demonstrations)} won games of {self.expert.__name__}, {moves:.1f} moves on average"


def play_transcript(environment: gymnasium.Env[str, str], task: Task, expert: Expert, max_steps: int) -> Transcript:
    """Let ``expert`` play ``task`` to its end or to ``max_steps`` actions."""
    text, info = environment.reset(seed=task.seed, options={"task": task.id})
    instruction = str(info["task"])
    expert.reset(instruction, text)
    steps: list[Step] = []
    won, refused = False, 0
    for _ in range(max_steps):
        action = expert.act(text)
        steps.append(Step(text, action, expert.motive, tuple(info.get("admissible_actions", ()))))
        text, _, terminated, truncated, info = environment.step(action)
        refused += text.lower().startswith("nothing happens")
        won = bool(info.get("won", False))
        if terminated or truncated:
            break
    return Transcript(task, instruction, tuple(steps), won, refused)

"""Coached play: the policy plays, the expert takes over now and then, and only the expert's moves are learned.

Demonstrations show the expert's own states. A policy that clones them soon stands where no expert ever stood, having
overlooked the mug or tried a door that is not there, and does not know how to go on. In coached games its own mistakes
are in the context, and the expert shows the way back (dataset aggregation, DAgger: Ross, Gordon and Bagnell, 2011).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spear_lightning.agents.base import AgentSession, Ids, Prompt, Response
from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.engines.base import Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.base import Observation, Task, TaskSuite
from spear_lightning.environments.expert import DemonstrationNoise, Expert
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.sft.demonstrations import TokenRow
from spear_lightning.utils.randomness import stream_seed, uniforms

_MOST_TURNS = 1000
_ACTIVE = 64  # episodes played together


@dataclass(frozen=True)
class Coaching:
    """How coached games are played and learned, after the demonstrations.

    Args:
        rounds: of playing the training games and learning from all coached games so far; 0 for none.
        share: of the turns in which the expert's move is made.
        temperature: that the policy plays at.
        max_turns: of a coached game.
        epochs: passes over demonstrations and coached games after each round.
        learning_rate: peak of AdamW's learning rate in these passes.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    rounds: int = 0
    share: float = 0.5
    temperature: float = 1.0
    max_turns: int = 20
    epochs: int = 1
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"coaching.rounds must not be negative, got {self.rounds}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"coaching.share must be in (0, 1], got {self.share}.")
        for name in ("temperature", "max_turns", "epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"coaching.{name} must be above 0, got {getattr(self, name)}.")
        if self.max_turns > _MOST_TURNS:
            raise ValueError(f"coaching.max_turns must be at most {_MOST_TURNS}, got {self.max_turns}.")


def play_coached(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: TaskSuite,
    tasks: Sequence[Task],
    settings: Coaching,
    *,
    seed: int,
    max_response_tokens: int,
    wandering: DemonstrationNoise,
    workers: int,
    expert: type[Expert] = SearchExpert,
) -> list[TokenRow]:
    """Play each task once with the policy as it is, coached.

    Args:
        network: the policy's weights.
        tokenizer: of the policy.
        suite: makes the environments.
        tasks: to play.
        settings: how.
        seed: of the sampling, the expert and its interventions.
        max_response_tokens: of a turn.
        wandering: of the expert; its detours and blunders are made but not learned.
        workers: environment processes.
        expert: that coaches.

    Returns:
        Rows in which only the expert's moves are learned.
    """
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        policy = Policy(model=folder)
    agent = CoachedAgent(seed, settings.share, wandering, expert)
    agent.bind(policy.tokenizer)
    engine = HuggingFaceEngine()
    engine.sync(policy, 0)
    collector = Collector(EnvironmentPool(suite, workers=workers), agent, engine, max_active=_ACTIVE)
    try:
        specs = [EpisodeSpec(task, number, 0) for number, task in enumerate(tasks)]
        sampling = Sampling(max_response_tokens, settings.temperature, agent.stop_ids)
        collector.play(specs, sampling, iteration=0, seed=seed, max_turns=settings.max_turns)
    finally:
        collector.close()
    return agent.rows()


class CoachedAgent(TranscriptAgent):
    """A transcript agent beside which the expert sits.

    Args:
        seed: of the expert and of its interventions.
        share: of turns in which the expert's move is made in place of the policy's.
        wandering: of the expert.
        expert: that sits there.
    """

    def __init__(
        self,
        seed: int,
        share: float,
        wandering: DemonstrationNoise = DemonstrationNoise(),  # noqa: B008 - frozen
        expert: type[Expert] = SearchExpert,
    ) -> None:
        super().__init__()
        self._seed, self._share, self._wandering, self._expert = seed, share, wandering, expert
        self._players: list[DaggerSession] = []

    def start(self, task: Task, observation: Observation) -> DaggerSession:  # type: ignore[override]
        """Begin an episode."""
        seed = stream_seed("coach", self._seed, task.id)
        takes_over = uniforms(seed, _MOST_TURNS) < self._share
        player = DaggerSession(self, observation, self._expert(seed, self._wandering), takes_over)
        self._players.append(player)
        return player

    def rows(self) -> list[TokenRow]:
        """One row for each episode in which the expert made a move, in the order in which they began."""
        rows = [player.row() for player in self._players]
        return [row for row in rows if row.mask.any()]


class DaggerSession(AgentSession):
    """One episode of a :class:`CoachedAgent`.

    Args:
        agent: that it belongs to.
        observation: the first one.
        expert: that coaches.
        takes_over: whether the expert's move is made, by turn, bool ``(turns,)``.
    """

    def __init__(
        self, agent: CoachedAgent, observation: Observation, expert: Expert, takes_over: npt.NDArray[np.bool_]
    ) -> None:
        self._agent, self._expert, self._takes_over = agent, expert, takes_over
        self._turn = 0
        self._expert.reset(observation.task, observation.text)
        self._text = observation.text
        self._admissible = observation.admissible
        self._appended = agent.opening_ids(observation.task, observation.text)
        self._pieces: list[tuple[Ids, bool]] = [(self._appended, False)]

    def prompt(self) -> Prompt:
        """The whole transcript."""
        return Prompt(np.concatenate([ids for ids, _ in self._pieces]), self._appended)

    def respond(self, ids: Ids) -> Response:
        """Append the policy's response, or the expert's in its place."""
        move = self._expert.act(self._text)
        coached = bool(self._takes_over[self._turn % _MOST_TURNS])
        self._turn += 1
        if coached:
            ids = self._agent.response_ids(move)
        response = self._agent.interpret(ids, self._admissible)
        if not coached:
            self._expert.overrule(response.action or "")
        self._pieces.append((ids, coached and self._expert.motive == "purpose"))
        return response

    def observe(self, observation: Observation) -> None:
        """Append the observation."""
        self._text, self._admissible = observation.text, observation.admissible
        self._appended = self._agent.continuation_ids(observation.text)
        self._pieces.append((self._appended, False))

    def row(self) -> TokenRow:
        """What was played, with the expert's moves to be learned."""
        return TokenRow(
            np.concatenate([ids for ids, _ in self._pieces]).astype(np.int32),
            np.concatenate([np.full(len(ids), learned) for ids, learned in self._pieces]),
        )

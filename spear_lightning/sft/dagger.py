"""Dataset aggregation (DAgger: Ross, Gordon and Bagnell, 2011): the policy plays, and the expert's moves are learned.

Demonstrations show the expert's own states. A policy that clones them soon stands where no expert ever stood, having
overlooked the mug or tried a door that is not there, and does not know how to go on. Here its own mistakes are in the
context, the expert takes over now and then, and shows the way back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from spear_lightning.agents.base import Ids, Response
from spear_lightning.agents.transcript import TranscriptAgent, TranscriptSession
from spear_lightning.data.samples import Sample
from spear_lightning.environments.base import Observation, Task, TaskSuite
from spear_lightning.environments.expert import Expert
from spear_lightning.sft.demonstrations import ExpertDemonstrations
from spear_lightning.sft.evaluation import HeldOut, play
from spear_lightning.sft.module import sample_of
from spear_lightning.utils.randomness import stream_seed, uniforms
from spear_lightning.utils.ranges import Above0, NotNegative, Positive, Share, in_range

_MOST_TURNS = 1000


@in_range
@dataclass(frozen=True)
class Dagger:
    """Rounds of DAgger after the demonstrations have been learned.

    Args:
        rounds: of playing the training games and learning from all of these games so far; 0 for none.
        share: of the turns in which the expert's move is made.
        temperature: that the policy plays at.
        max_turns: of a game.
        epochs: passes over demonstrations and games after each round.
        learning_rate: peak of AdamW's learning rate in these passes.

    Raises:
        ValueError: a number is out of range.
    """

    rounds: NotNegative = 0
    share: Share = 0.5
    temperature: Above0 = 1.0
    max_turns: Annotated[int, Ge(1), Le(_MOST_TURNS)] = 20
    epochs: Positive = 1
    learning_rate: Above0 = 1e-3


def play_dagger(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: TaskSuite,
    tasks: Sequence[Task],
    settings: Dagger,
    demonstrations: ExpertDemonstrations,
    *,
    seed: int,
    max_response_tokens: int,
    workers: int,
) -> list[Sample]:
    """Play each task once with the policy, the expert making some of the moves.

    Args:
        network: the policy's weights.
        tokenizer: of the policy.
        suite: makes the environments.
        tasks: to play.
        settings: how.
        demonstrations: whose expert it is; its noise is made but not learned.
        seed: of the sampling, the expert and its interventions.
        max_response_tokens: of a turn.
        workers: environment processes.

    Returns:
        Samples in which only the expert's moves are learned.
    """
    agent = DaggerAgent(seed, settings.share, demonstrations)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        how = HeldOut(None, (settings.temperature,), settings.max_turns, max_response_tokens)
        play(Path(folder), suite, tasks, agent, how, workers=workers, seed=seed, max_active=64)
    return agent.samples()


class DaggerAgent(TranscriptAgent):
    """A transcript agent some of whose moves an expert makes.

    Args:
        seed: of the expert and of its interventions.
        share: of turns in which the expert's move is made in place of the policy's.
        demonstrations: whose expert it is.
    """

    def __init__(self, seed: int, share: float, demonstrations: ExpertDemonstrations) -> None:
        super().__init__()
        self._seed, self._share, self._demonstrations = seed, share, demonstrations
        self._sessions: list[DaggerSession] = []

    @override
    def start(self, task: Task, observation: Observation) -> DaggerSession:
        seed = stream_seed("coach", self._seed, task.id)
        takes_over = uniforms(seed, _MOST_TURNS) < self._share
        expert = self._demonstrations.expert(seed, self._demonstrations.noise)
        self._sessions.append(DaggerSession(self, observation, expert, takes_over))
        return self._sessions[-1]

    def samples(self) -> list[Sample]:
        """One for each episode in which the expert made a move, in the order in which they began."""
        samples = [sample_of(session.pieces) for session in self._sessions]
        return [sample for sample in samples if sample.mask.any()]


class DaggerSession(TranscriptSession):
    """One episode of a :class:`DaggerAgent`.

    Args:
        agent: that it belongs to.
        observation: the first one.
        expert: that makes some of its moves.
        takes_over: whether the expert's move is made, by turn, bool ``(turns,)``.

    Attributes:
        pieces: of what was played, each with whether it is to be learned.
    """

    def __init__(
        self, agent: DaggerAgent, observation: Observation, expert: Expert, takes_over: npt.NDArray[np.bool_]
    ) -> None:
        super().__init__(agent, observation)
        self._expert, self._takes_over = expert, iter(takes_over)
        self._expert.reset(observation.task, observation.text)
        self._text = observation.text
        self.pieces: list[tuple[Ids, bool]] = [(self._appended, False)]

    @override
    def respond(self, ids: Ids) -> Response:
        move = self._expert.act(self._text)
        by_expert = bool(next(self._takes_over))
        if by_expert:
            ids = self._agent.response_ids(move)
        response = super().respond(ids)
        if not by_expert:
            self._expert.overrule(response.action or "")
        self.pieces.append((ids, by_expert and self._expert.motive == "purpose"))
        return response

    @override
    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        self._text = observation.text
        self.pieces.append((self._appended, False))

"""Rows to train on that were really played: generated ALFWorld games, the shipped policy, either context."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spear_lightning.agents.base import AgentSession, Ids, Response
from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.agents.transcript import TranscriptAgent, TranscriptSession
from spear_lightning.algorithm import GRPO, QualityFilters, RewardComposer
from spear_lightning.data.admission import fresh_samples
from spear_lightning.data.samples import Sample
from spear_lightning.data.scoring import estimate_advantages, score_episode
from spear_lightning.engines.base import Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.alfworld import ALFWorld, SceneSize
from spear_lightning.environments.base import Observation, Task
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.specs import TrainingRollouts, training_specs

TASK_TYPES = [
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
]


@dataclass
class Played:
    """One iteration's episodes as training rows.

    Attributes:
        rows: in ``conversation`` context: one per episode, with GRPO's advantages.
        stepwise: the same episodes as ``StepwiseAgent`` would have asked for them: prompt and response of each turn,
            int32 ``(tokens,)``, by ``(task, number of the attempt, turn)``.
    """

    rows: dict[str, Sample] = field(default_factory=dict)
    stepwise: dict[tuple[str, int, int], tuple[Ids, Ids]] = field(default_factory=dict)


def play(tasks: int, group_size: int, seed: int = 1, max_turns: int = 15, cache: Path | None = None) -> Played:
    """Play one iteration of the quickstart's kind with the shipped policy.

    Args:
        tasks: games.
        group_size: episodes of each game.
        seed: of games' order and sampling.
        max_turns: of an episode.
        cache: where generated games are kept; ``None`` is the user's cache.
    """
    suite = ALFWorld(
        train=tasks,
        validation=1,
        test=1,
        task_types=TASK_TYPES,
        scene=SceneSize(receptacles=(5, 9), distractors=(2, 5)),
        max_steps=max_turns,
        cache_dir=None if cache is None else str(cache),
    )
    suite.prepare()
    policy, agent = Policy(model="embedded"), _BothContexts()
    agent.bind(policy.tokenizer)
    engine = HuggingFaceEngine()
    engine.sync(policy, 0)
    collector = Collector(EnvironmentPool(suite, workers=1), agent, engine)
    settings = TrainingRollouts(tasks=tasks, group_size=group_size)
    specs = training_specs(suite.tasks("train"), settings, seed=seed, iteration=0, rank=0, world_size=1)
    try:
        sampling = Sampling(max_new_tokens=8, temperature=1.0, stop_ids=agent.stop_ids)
        done = collector.play(specs, sampling, iteration=0, seed=seed, max_turns=max_turns)
    finally:
        collector.close()
    filters = QualityFilters(overlong=False, incomplete=False, repetitive=False, unreadable=False, keep_share=1.0)
    scored = [score_episode(episode, RewardComposer(), filters, 1.0) for episode in done.episodes]
    estimate_advantages(scored, GRPO(normalize_std=False), filters)
    return Played(fresh_samples(scored), agent.stepwise)


class _BothContexts(TranscriptAgent):
    """Plays in the transcript that the shipped policy knows, and writes down the stepwise prompts of the same turns."""

    def __init__(self) -> None:
        super().__init__(require_admissible=True)
        self.stepwise: dict[tuple[str, int, int], tuple[Ids, Ids]] = {}
        self._other = StepwiseAgent(think=False)
        self._attempts: Counter[str] = Counter()

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().bind(tokenizer)
        self._other.bind(tokenizer)

    def start(self, task: Task, observation: Observation) -> TranscriptSession:
        self._attempts[task.id] += 1
        return _BothPlayer(self, observation, self._other.start(task, observation), (task.id, self._attempts[task.id]))


class _BothPlayer(TranscriptSession):
    def __init__(
        self, agent: _BothContexts, observation: Observation, other: AgentSession, attempt: tuple[str, int]
    ) -> None:
        super().__init__(agent, observation)
        self._record, self._other, self._attempt, self._turn = agent.stepwise, other, attempt, 0

    def respond(self, ids: Ids) -> Response:
        self._record[(*self._attempt, self._turn)] = (self._other.prompt().ids, ids)
        self._turn += 1
        self._other.respond(ids)
        return super().respond(ids)

    def observe(self, observation: Observation) -> None:
        self._other.observe(observation)
        super().observe(observation)

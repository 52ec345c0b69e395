"""What a warm-started policy scores on held-out games, played exactly as reinforcement learning will play."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spear_lightning.agents.base import Agent
from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.engines.base import Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.base import TaskSuite
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Episode
from spear_lightning.rollout.specs import EpisodeSpec


@dataclass(frozen=True)
class HeldOut:
    """How the result of a warm start is measured.

    Args:
        tasks: number of validation games; ``None`` takes all.
        temperatures: one evaluation each; empty measures nothing.
        max_turns: of an episode.
        max_response_tokens: of a turn.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    tasks: int | None = None
    temperatures: tuple[float, ...] = (1.0, 0.4)
    max_turns: int = 15
    max_response_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("tasks", "max_turns", "max_response_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"held_out.{name} must be at least 1, got {value}.")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"held_out.temperatures must not be negative, got {list(self.temperatures)}.")


@dataclass(frozen=True, slots=True)
class Score:
    """Result of one evaluation.

    Attributes:
        temperature: it was played at.
        episodes: number of games.
        success: share of games won.
        by_kind: the same by task type.
        void: share of turns without a parseable action.
        refused: share of turns whose action the engine would not accept.
        turns: mean number of turns.
    """

    temperature: float
    episodes: int
    success: float
    by_kind: dict[str, float]
    void: float
    refused: float
    turns: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success share."""
        n, p, z = self.episodes, self.success, 1.96
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"held-out success at temperature {self.temperature:g}: {self.success:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%}, {self.episodes} games); {self.turns:.1f} turns a game; "
            f"{self.void:.1%} of turns without an action, {self.refused:.1%} refused by the engine"
        )


def evaluate(
    suite: TaskSuite, folder: Path, settings: HeldOut, *, workers: int, seed: int, agent: Agent | None = None
) -> list[Score]:
    """Play the suite's validation games with the policy in ``folder``, once per temperature.

    Args:
        suite: with a validation split.
        folder: Hugging Face folder of the policy.
        settings: how to play.
        workers: environment processes.
        seed: of the sampling.
        agent: that plays; ``None`` is a ``TranscriptAgent``.
    """
    if not settings.temperatures:
        return []
    policy = Policy(model=str(folder))
    agent = agent or TranscriptAgent()
    agent.bind(policy.tokenizer)
    engine = HuggingFaceEngine()
    engine.sync(policy, 0)
    specs = [EpisodeSpec(task, number, 0) for number, task in enumerate(suite.tasks("validation")[: settings.tasks])]
    collector = Collector(EnvironmentPool(suite, workers=workers), agent, engine, max_active=128)
    try:
        scores = []
        for temperature in settings.temperatures:
            sampling = Sampling(settings.max_response_tokens, temperature, agent.stop_ids)
            played = collector.play(specs, sampling, iteration=0, seed=seed, max_turns=settings.max_turns)
            scores.append(summarise(played.episodes, temperature))
        return scores
    finally:
        collector.close()


def summarise(episodes: Sequence[Episode], temperature: float) -> Score:
    """Count successes and refusals; aborted episodes are left out.

    Raises:
        RuntimeError: every episode was aborted.
    """
    played = [episode for episode in episodes if episode.status != "aborted"]
    if not played:
        raise RuntimeError(
            f"All {len(episodes)} held-out episodes were aborted: {episodes[0].reason if episodes else ''}"
        )
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for episode in played:
        by_kind[episode.task.task_type].append(episode.success)
    turns = sum(len(episode.turns) for episode in played)
    void = sum(turn.action is None for episode in played for turn in episode.turns)
    refused = sum(
        later.observation.startswith("Nothing happens") and turn.action is not None
        for episode in played
        for turn, later in zip(episode.turns, episode.turns[1:], strict=False)
    )
    answered = max(1, turns - len(played))  # the answer to an episode's last action is no turn's observation
    return Score(
        temperature=temperature,
        episodes=len(played),
        success=sum(episode.success for episode in played) / len(played),
        by_kind={kind: sum(won) / len(won) for kind, won in sorted(by_kind.items())},
        void=void / max(1, turns),
        refused=refused / answered,
        turns=turns / len(played),
    )

"""What a cloned policy scores on held-out games, played exactly as reinforcement learning will play."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from spear_lightning.agents.base import Agent
from spear_lightning.engines.base import Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.base import Task, TaskSuite
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.metrics.evaluation import EpisodeRecord, Rate, Results
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Episode
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.utils.ranges import Positive, in_range


@in_range
@dataclass(frozen=True)
class HeldOut:
    """How the result is measured.

    Args:
        tasks: number of validation games; ``None`` takes all.
        temperatures: one evaluation each; empty measures nothing.
        max_turns: of an episode.
        max_response_tokens: of a turn.

    Raises:
        ValueError: a number is out of range.
    """

    tasks: Positive | None = None
    temperatures: tuple[float, ...] = (1.0, 0.4)
    max_turns: Positive = 15
    max_response_tokens: Positive = 16

    def __post_init__(self) -> None:
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"HeldOut.temperatures must not be negative, not {list(self.temperatures)}")


@dataclass(frozen=True, slots=True)
class Score:
    """Result of one evaluation.

    Attributes:
        temperature: it was played at.
        success: of all games.
        by_type: the same by task type.
        unparsable: share of turns without a parseable action.
        refused: share of turns whose action the engine would not accept.
        turns: mean number of turns.
    """

    temperature: float
    success: Rate
    by_type: dict[str, Rate]
    unparsable: float
    refused: float
    turns: float

    def __str__(self) -> str:
        low, high = self.success.interval()
        return (
            f"held-out success at temperature {self.temperature:g}: {self.success.share:.1%} "
            f"(95 % interval {low:.1%} to {high:.1%}, {self.success.episodes} games); {self.turns:.1f} turns a game; "
            f"{self.unparsable:.1%} of turns without an action, {self.refused:.1%} refused by the engine"
        )


def play(
    folder: Path,
    suite: TaskSuite,
    tasks: Sequence[Task],
    agent: Agent,
    settings: HeldOut,
    *,
    workers: int,
    seed: int,
    max_active: int = 128,
) -> list[list[Episode]]:
    """Play tasks with the policy in a folder, once per temperature.

    Args:
        folder: Hugging Face folder of the policy.
        suite: makes the environments.
        tasks: to play.
        agent: that plays; it is bound to the policy's tokenizer.
        settings: temperatures and limits.
        workers: environment processes.
        seed: of the sampling.
        max_active: episodes played together.
    """
    policy = Policy(model=str(folder))
    agent.bind(policy.tokenizer)
    engine = HuggingFaceEngine()
    engine.sync(policy, 0)
    specs = [EpisodeSpec(task, number, 0) for number, task in enumerate(tasks)]
    samplings = [Sampling(settings.max_response_tokens, each, agent.stop_ids) for each in settings.temperatures]
    pool = EnvironmentPool(suite, workers=workers)
    with closing(Collector(pool, agent, engine, max_active=max_active)) as collector:
        return [
            collector.play(specs, sampling, iteration=0, seed=seed, max_turns=settings.max_turns).episodes
            for sampling in samplings
        ]


def evaluate(
    suite: TaskSuite, folder: Path, settings: HeldOut, agent: Agent, *, workers: int, seed: int
) -> list[Score]:
    """Play the suite's validation games with the policy in ``folder``, once per temperature; see :func:`play`."""
    tasks = suite.tasks("validation")[: settings.tasks]
    played = play(folder, suite, tasks, agent, settings, workers=workers, seed=seed) if settings.temperatures else []
    return [score_of(episodes, each) for episodes, each in zip(played, settings.temperatures, strict=True)]


def score_of(episodes: Sequence[Episode], temperature: float) -> Score:
    """Count successes and refusals; aborted episodes are left out.

    Raises:
        RuntimeError: every episode was aborted.
    """
    played = [episode for episode in episodes if episode.status != "aborted"]
    if not played:
        raise RuntimeError(
            f"All {len(episodes)} held-out episodes were aborted: {episodes[0].reason if episodes else ''}"
        )
    results = Results([EpisodeRecord.of(episode) for episode in played])
    turns = sum(record.turns for record in results.records)
    refused = sum(
        later.observation.startswith("Nothing happens") and turn.action is not None
        for episode in played
        for turn, later in zip(episode.turns, episode.turns[1:], strict=False)
    )
    answered = max(1, turns - len(played))  # the answer to an episode's last action is no turn's observation
    return Score(
        temperature=temperature,
        success=results.success,
        by_type=results.by_type,
        unparsable=sum(turn.action is None for episode in played for turn in episode.turns) / max(1, turns),
        refused=refused / answered,
        turns=turns / len(played),
    )

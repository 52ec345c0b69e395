"""Plays episodes: environments and the engine side by side, finished episodes leave, waiting ones take their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from spear_lightning.agents.base import Agent
from spear_lightning.engines.base import RolloutEngine, Sampling
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.rollout.episode_batch import EpisodeSpec, Phase, PlayedEpisodes, Rules
from spear_lightning.rollout.schedules import RolloutSchedule, Waves

__all__ = ["Collector", "EpisodeSpec", "PlayedEpisodes"]


class Collector:
    """Plays episodes with an agent and an engine.

    What an episode is depends only on (seed, iteration, task, index) and the weights, never on which other episodes are
    played beside it, or how many, or how long their environments take.

    Args:
        pool: of environments.
        agent: bound to the policy's tokenizer.
        engine: that generates.
        max_active: most episodes at a time; ``None`` plays all that are asked for together.
        max_episode_tokens: length limit of an episode in ``conversation`` context, prompts included; one that reaches
            it is truncated as ``overlong``. ``None`` leaves the limit to the engine.
        schedule: when environments are stepped and when responses are generated.

    Raises:
        ValueError: a limit is not positive.
    """

    def __init__(
        self,
        pool: EnvironmentPool,
        agent: Agent,
        engine: RolloutEngine,
        max_active: int | None = None,
        max_episode_tokens: int | None = None,
        schedule: RolloutSchedule = Waves(),  # noqa: B008 - frozen
    ) -> None:
        for name, limit in (("max_active", max_active), ("max_episode_tokens", max_episode_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
        self.pool, self.agent, self.engine = pool, agent, engine
        self.max_active = max_active
        self.max_episode_tokens = max_episode_tokens
        self.schedule = schedule

    def play(
        self,
        specs: Sequence[EpisodeSpec],
        sampling: Sampling,
        *,
        iteration: int,
        seed: int,
        max_turns: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> PlayedEpisodes:
        """Play one episode per spec.

        Args:
            specs: to play, in order.
            sampling: of each response; the agent's stop tokens are added. ``max_new_tokens`` is per turn.
            iteration: recorded in the episodes; names the random stream together with ``seed``.
            seed: of the run and split.
            max_turns: turns after which an episode is truncated.
            on_step: called when environments have answered, with the number of episodes finished and still active.

        Raises:
            EnvironmentPoolError: the environments do not work at all.
        """
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {max_turns}")
        rules = Rules(
            sampling=replace(sampling, stop_ids=tuple(sorted({*sampling.stop_ids, *self.agent.stop_ids}))),
            iteration=iteration,
            seed=seed,
            max_turns=max_turns,
            max_episode_tokens=self.max_episode_tokens if self.agent.context == "conversation" else None,
        )
        phase = Phase(specs, self.pool, self.agent, self.engine, rules, on_step)
        try:
            if specs:
                self.schedule.play(phase, min(self.max_active or len(specs), len(specs)))
        finally:
            phase.stop()
        return phase.result()

    def close(self) -> None:
        """Stop the environment workers and free the engine."""
        self.pool.close()
        self.engine.close()

"""Plays episodes: environments and the engine side by side, finished episodes leave, waiting ones take their place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from spear_lightning.agents.base import Agent
from spear_lightning.engines.base import RolloutEngine, Sampling
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.rollout.episode_batch import EpisodeBatch, RolloutResult, Rules
from spear_lightning.rollout.specs import EpisodeSpec


class RolloutSchedule(ABC):
    """Plays all episodes of a phase. A base class, so that a configuration can name a schedule by its class name."""

    @abstractmethod
    def play(self, phase: EpisodeBatch, active: int) -> None:
        """Play to the end.

        Args:
            phase: whose episodes have not begun.
            active: most episodes at a time.
        """


@dataclass(frozen=True)
class Lockstep(RolloutSchedule):
    """Episodes in waves that take turns: while one generates, the environments of the others are stepped.

    A wave goes on when all its environments have answered, in a fixed order, so every run has the same batches. Tasks
    are dealt to waves as a whole, because the episodes of a group share their first prompt.

    Args:
        count: of waves. With one, environments are waited for at each turn; with two, generation hides them where both
            take about the same time. Each wave is a smaller batch: more passes through the model for the same tokens.

    Raises:
        ValueError: there is not a single wave.
    """

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"data.schedule.count must be at least 1, not {self.count}")

    def play(self, phase: EpisodeBatch, active: int) -> None:
        """Play to the end."""
        waves = deal(phase.specs, min(self.count, active))
        size, more = divmod(active, len(waves) or 1)
        first = 0
        playing = []
        for number, specs in enumerate(waves):
            slots = size + (number < more)
            playing.append(_Wave(deque(specs), deque(range(first, first + slots))))
            first += slots
        for wave in playing:
            wave.fill(phase)
        while playing := [wave for wave in playing if wave.turn(phase)]:
            pass


@dataclass
class _Wave:
    """Episodes that are played in step."""

    waiting: deque[int]
    free: deque[int]
    stepping: list[int] = field(default_factory=list)  # slots whose environment owes an answer

    def fill(self, phase: EpisodeBatch) -> None:
        """Have waiting episodes opened in free slots."""
        starting = {self.free.popleft(): self.waiting.popleft() for _ in range(min(len(self.waiting), len(self.free)))}
        phase.begin(starting)
        self.stepping += starting

    def turn(self, phase: EpisodeBatch) -> bool:
        """One response for each episode; false if there is none any more."""
        over = phase.observe(phase.gather(self.stepping))
        ready = sorted(set(self.stepping).difference(over))
        requests, overlong = phase.requests(ready)
        self.free.extend([*over, *overlong])
        self.stepping = []
        self.fill(phase)  # new episodes open while this turn is generated
        acting, overlong = phase.act(phase.generate(requests))
        self.free.extend(overlong)
        self.stepping += acting
        self.fill(phase)
        return bool(self.stepping)


@dataclass(frozen=True)
class Asynchronous(RolloutSchedule):
    """Each episode goes on as soon as its environment has answered; it waits for no other one.

    The fastest where environments are slow, or some much slower than others. Which responses are generated together is
    then a question of time: two runs of the same seed play the same episodes, with log-probabilities that may differ in
    the last bit, so their learning curves part sooner or later. Use :class:`Lockstep` where runs must repeat exactly.
    """

    def play(self, phase: EpisodeBatch, active: int) -> None:
        """Play to the end."""
        waiting, free = deque(range(len(phase.specs))), deque(range(active))
        stepping = 0
        stream = phase.engine.stream()
        try:
            while True:
                starting = {free.popleft(): waiting.popleft() for _ in range(min(len(waiting), len(free)))}
                phase.begin(starting)
                stepping += len(starting)
                if not stepping and not stream.unfinished:
                    return
                arrived = phase.receive(wait=not stream.unfinished) if stepping else {}
                stepping -= len(arrived)
                over = phase.observe(arrived)
                requests, overlong = phase.requests(sorted(set(arrived).difference(over)))
                if requests:
                    stream.submit(requests)
                acting, roomless = phase.act(phase.poll(stream)) if stream.unfinished else ([], [])
                stepping += len(acting)
                free.extend([*over, *overlong, *roomless])
        finally:
            stream.close()


def deal(specs: Sequence[EpisodeSpec], count: int) -> list[list[int]]:
    """Deal episodes to waves of about the same size, groups as a whole where there are enough of them.

    Args:
        specs: to deal.
        count: of waves, if there are as many episodes.

    Returns:
        The numbers of the episodes of each wave.

    >>> from spear_lightning.environments.base import Task
    >>> deal([EpisodeSpec(Task("a"), group, index) for group in range(3) for index in range(2)], 2)
    [[0, 1, 2, 3], [4, 5]]
    """
    groups = {group: rank for rank, group in enumerate(dict.fromkeys(spec.group for spec in specs))}
    waves: list[list[int]] = [[] for _ in range(min(count, len(specs)))]
    whole = len(groups) >= len(waves)
    for number, spec in enumerate(specs):
        place, of = (groups[spec.group], len(groups)) if whole else (number, len(specs))
        waves[place * len(waves) // of].append(number)
    return waves


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
        schedule: RolloutSchedule = Lockstep(),
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
    ) -> RolloutResult:
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
        phase = EpisodeBatch(specs, self.pool, self.agent, self.engine, rules, on_step)
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

"""Plays episodes: environments and the engine side by side, finished episodes leave, waiting ones take their place.

Each episode is a coroutine (:func:`~spear_lightning.rollout.episode.play_episode`) that says what it waits for. The
collector's loop brings requests to the engine and actions to the environments, and the answers back.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from typing_extensions import override

from spear_lightning.agents.base import Agent
from spear_lightning.engines.base import BatchStream, Completion, CompletionStream, RolloutEngine, Sampling
from spear_lightning.environments.base import Observation, Split
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.rollout.episode import Episode, EpisodeCoroutine, EpisodeRules, Rollout, play_episode
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.utils.ranges import Positive, in_range


class RolloutSchedule(ABC):
    """Which environments are waited for, and which responses are generated together.

    A base class, so that a configuration can name a schedule by its class name.
    """

    @abstractmethod
    def waves(self, specs: Sequence[EpisodeSpec], active: int) -> list[list[int]]:
        """Numbers of the episodes that are played in step with each other, ``active`` at most at a time in all."""

    @abstractmethod
    def stream(self, engine: RolloutEngine) -> CompletionStream:
        """What takes the requests."""

    @abstractmethod
    def wait(self, pool: EnvironmentPool, slots: Sequence[int], generating: bool) -> dict[int, Observation]:
        """Answers of environments, by slot.

        Args:
            pool: of environments.
            slots: of a wave whose environments owe an answer.
            generating: whether the engine has something left to do.
        """


@in_range
@dataclass(frozen=True)
class Lockstep(RolloutSchedule):
    """Episodes in waves that take turns: while one generates, the environments of the others are stepped.

    A wave goes on when all its environments have answered, in a fixed order, so every run has the same batches. Tasks
    are dealt to waves as a whole, because the episodes of a group share their first prompt.

    Args:
        count: of waves. With one, environments are waited for at each turn; with two, generation hides them where both
            take about the same time. Each wave is a smaller batch: more passes through the model for the same tokens.
    """

    count: Positive = 1

    @override
    def waves(self, specs: Sequence[EpisodeSpec], active: int) -> list[list[int]]:
        return deal(specs, min(self.count, active))

    @override
    def stream(self, engine: RolloutEngine) -> CompletionStream:
        return BatchStream(engine)

    @override
    def wait(self, pool: EnvironmentPool, slots: Sequence[int], generating: bool) -> dict[int, Observation]:
        return pool.gather(slots)


@dataclass(frozen=True)
class Asynchronous(RolloutSchedule):
    """Each episode goes on as soon as its environment has answered; it waits for no other one.

    The fastest where environments are slow, or some much slower than others. Which responses are generated together is
    then a question of time: two runs of the same seed play the same episodes, with log-probabilities that may differ in
    the last bit, so their learning curves part sooner or later. Use :class:`Lockstep` where runs must repeat exactly.
    """

    @override
    def waves(self, specs: Sequence[EpisodeSpec], active: int) -> list[list[int]]:
        return deal(specs, 1)

    @override
    def stream(self, engine: RolloutEngine) -> CompletionStream:
        return engine.stream()

    @override
    def wait(self, pool: EnvironmentPool, slots: Sequence[int], generating: bool) -> dict[int, Observation]:
        return pool.receive(0.0 if generating else None) if slots else {}


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


@dataclass(slots=True)
class _Wave:
    """Episodes that are played in step. Each running one has a slot of the pool and a session of the engine."""

    waiting: deque[tuple[str, EpisodeCoroutine]]
    free: deque[int]
    running: dict[int, tuple[str, EpisodeCoroutine]] = field(default_factory=dict)
    stepping: set[int] = field(default_factory=set)  # slots whose environment owes an answer


@in_range
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
        schedule: which environments are waited for, and which responses are generated together.
    """

    def __init__(
        self,
        pool: EnvironmentPool,
        agent: Agent,
        engine: RolloutEngine,
        max_active: Positive | None = None,
        max_episode_tokens: Positive | None = None,
        schedule: RolloutSchedule = Lockstep(),
    ) -> None:
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
        split: Split = "train",
        on_step: Callable[[int, int], None] = lambda finished, active: None,
    ) -> Rollout:
        """Play one episode per spec.

        Args:
            specs: to play, in order.
            sampling: of each response; the agent's stop tokens are added. ``max_new_tokens`` is per turn.
            iteration: recorded in the episodes; names the random stream together with ``seed``.
            seed: of the run and split.
            max_turns: turns after which an episode is truncated.
            split: that the tasks are of.
            on_step: called when environments have answered, with the number of episodes finished and still active.

        Raises:
            EnvironmentPoolError: the environments do not work at all.
            ValueError: ``max_turns`` is not positive.
        """
        started, seconds = time.perf_counter(), {"generation": 0.0, "environment": 0.0}
        stop_ids = tuple(sorted({*sampling.stop_ids, *self.agent.stop_ids}))
        limit = self.max_episode_tokens if self.agent.context == "conversation" else None
        rules = EpisodeRules(replace(sampling, stop_ids=stop_ids), seed, max_turns, limit)
        episodes = [Episode(spec.task, spec.group, spec.index, iteration, self.agent.context) for spec in specs]
        waves = self._waves(specs, episodes, rules)
        stream = self.schedule.stream(self.engine)
        try:
            with _clock(seconds, "environment"):
                self._open(waves)
            while any(wave.running for wave in waves):
                for wave in (wave for wave in waves if wave.running):
                    with _clock(seconds, "environment"):
                        observations = self.schedule.wait(self.pool, sorted(wave.stepping), stream.unfinished > 0)
                    requests = self._resume(wave, observations)
                    if observations:
                        active = sum(len(wave.running) for wave in waves)
                        on_step(len(specs) - active - sum(len(wave.waiting) for wave in waves), active)
                    with _clock(seconds, "environment"):
                        self._open([wave])  # new episodes open while this turn is generated
                    with _clock(seconds, "generation"):
                        if requests:
                            stream.submit(list(requests.values()))
                        completions = stream.poll() if stream.unfinished else {}
                    slots = {session: slot for slot, (session, _) in wave.running.items()}
                    actions = self._resume(wave, {slots[session]: found for session, found in completions.items()})
                    with _clock(seconds, "environment"):
                        if actions:
                            self.pool.send_step(actions)
                        wave.stepping |= actions.keys()
                        self._open([wave])
        finally:
            stream.close()
            for wave in waves:  # an episode is still running only if something raised
                for slot in list(wave.running):
                    self._end(wave, slot)
        seconds["other"] = time.perf_counter() - started - sum(seconds.values())
        return Rollout.of(split, iteration, episodes, seconds)

    def close(self) -> None:
        """Stop the environment workers and free the engine."""
        self.pool.close()
        self.engine.close()

    def _waves(self, specs: Sequence[EpisodeSpec], episodes: Sequence[Episode], rules: EpisodeRules) -> list[_Wave]:
        """The episodes, none of which has begun, and the slots that each wave may use."""
        active = min(self.max_active or len(specs), len(specs))
        parts = self.schedule.waves(specs, active)
        slots = iter(range(active))
        waves = []
        for number, part in enumerate(parts):
            free = deque(islice(slots, active // len(parts) + (number < active % len(parts))))
            waiting: deque[tuple[str, EpisodeCoroutine]] = deque()
            for place in part:
                episode = episodes[place]
                session = f"{rules.seed}/{episode.iteration}/{episode.group}/{episode.index}/{place}"
                waiting.append((session, play_episode(episode, session, self.agent, rules)))
            waves.append(_Wave(waiting, free))
        return waves

    def _open(self, waves: Iterable[_Wave]) -> None:
        """Have environments reset for waiting episodes, as many as there are free slots."""
        for wave in waves:
            tasks: dict[int, Any] = {}
            while wave.waiting and wave.free:
                slot = wave.free.popleft()
                wave.running[slot] = wave.waiting.popleft()
                tasks[slot] = next(wave.running[slot][1])
            if tasks:
                self.pool.send_reset(tasks)
            wave.stepping |= tasks.keys()

    def _resume(self, wave: _Wave, answers: Mapping[int, Observation | Completion]) -> dict[int, Any]:
        """Give episodes what they wait for; what they wait for next, by slot. Those that are over leave their slot."""
        wanted = {}
        for slot, answer in sorted(answers.items()):
            wave.stepping.discard(slot)
            try:
                wanted[slot] = wave.running[slot][1].send(answer)
            except StopIteration:
                self._end(wave, slot)
        return wanted

    def _end(self, wave: _Wave, slot: int) -> None:
        session, _ = wave.running.pop(slot)
        self.engine.end(session)
        self.pool.release([slot])
        wave.free.append(slot)


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - started

"""Plays episodes: environments are stepped together, finished ones leave, waiting ones take their place."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from spear_lightning.engines.base import Completion, Request, RolloutEngine, Sampling
from spear_lightning.environments.base import Observation, Task
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.randomness import stream_seed
from spear_lightning.rollout.agent import Agent, Player, Prompt, Response
from spear_lightning.rollout.episode import Episode, Turn


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """An episode to be played.

    Attributes:
        task: to attempt.
        group: number of the task within the iteration.
        index: number of the episode within its group.
    """

    task: Task
    group: int
    index: int


@dataclass(frozen=True, slots=True)
class PlayedEpisodes:
    """What came of a list of specs.

    Attributes:
        episodes: one per spec, in the same order, aborted ones among them (``status == "aborted"``).
        seconds: wall-clock by phase: ``generation``, ``environment``, ``other`` (prompts and parsing).
        shortened: number of prompts from which something had to be left out, by what it was.
    """

    episodes: list[Episode]
    seconds: dict[str, float]
    shortened: dict[str, int] = field(default_factory=dict)

    @property
    def aborted(self) -> list[Episode]:
        """Episodes whose environment failed: neither successes nor failures."""
        return [episode for episode in self.episodes if episode.status == "aborted"]


@dataclass(slots=True)
class _Running:
    """An episode in a slot."""

    episode: Episode
    player: Player
    session: str
    observation: Observation


class Collector:
    """Plays episodes with an agent and an engine.

    What an episode is depends only on (seed, iteration, task, index) and the weights, never on which other episodes are
    played beside it, or how many.

    Args:
        pool: of environments.
        agent: bound to the policy's tokenizer.
        engine: that generates.
        max_active: most episodes at a time; ``None`` plays all that are asked for together.
        max_episode_tokens: length limit of an episode in ``conversation`` context, prompts included; one that reaches
            it is truncated as ``overlong``. ``None`` leaves the limit to the engine.

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
    ) -> None:
        for name, limit in (("max_active", max_active), ("max_episode_tokens", max_episode_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
        self.pool, self.agent, self.engine = pool, agent, engine
        self.max_active = max_active
        self.max_episode_tokens = max_episode_tokens

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
            on_step: called after each step of the environments with the number of episodes finished and still active.

        Raises:
            EnvironmentPoolError: the environments do not work at all.
        """
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, not {max_turns}")
        sampling = replace(sampling, stop_ids=tuple(sorted({*sampling.stop_ids, *self.agent.stop_ids})))
        phase = _Phase(self, specs, sampling, iteration, seed, max_turns)
        try:
            while phase.fill():
                phase.turn()
                if on_step is not None:
                    on_step(phase.finished, phase.active)
        finally:
            phase.stop()
        return phase.result()

    def close(self) -> None:
        """Stop the environment workers and free the engine."""
        self.pool.close()
        self.engine.close()


class _Phase:
    """The state of one call to :meth:`Collector.play`."""

    def __init__(
        self,
        collector: Collector,
        specs: Sequence[EpisodeSpec],
        sampling: Sampling,
        iteration: int,
        seed: int,
        max_turns: int,
    ) -> None:
        self._pool, self._agent, self._engine = collector.pool, collector.agent, collector.engine
        self._limit = collector.max_episode_tokens if collector.agent.context == "conversation" else None
        self._sampling, self._iteration, self._seed, self._max_turns = sampling, iteration, seed, max_turns
        self._episodes = [
            Episode(spec.task, spec.group, spec.index, iteration, collector.agent.context) for spec in specs
        ]
        self._waiting = deque(range(len(specs)))
        self._running: dict[int, _Running] = {}
        self._free = list(range(min(collector.max_active or len(specs), len(specs))))[::-1]
        self._shortened: Counter[str] = Counter()
        self._seconds = {"generation": 0.0, "environment": 0.0}
        self._started = time.perf_counter()

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def finished(self) -> int:
        return len(self._episodes) - len(self._running) - len(self._waiting)

    def fill(self) -> bool:
        """Begin waiting episodes in free slots; whether any episode is active then."""
        while self._waiting and self._free:
            starting = {
                self._free.pop(): self._waiting.popleft() for _ in range(min(len(self._waiting), len(self._free)))
            }
            with self._clock("environment"):
                opened = self._pool.reset({slot: self._episodes[number].task for slot, number in starting.items()})
            for slot, number in starting.items():
                episode, observation = self._episodes[number], opened[slot]
                self._running[slot] = _Running(
                    episode=episode,
                    player=self._agent.start(episode.task, observation),
                    session=f"{self._seed}/{self._iteration}/{episode.group}/{episode.index}/{number}",
                    observation=observation,
                )
                if observation.done:
                    self._finish(slot)
        return bool(self._running)

    def turn(self) -> None:
        """One response and one environment step for each active episode."""
        prompts, requests = {}, {}
        for slot, running in sorted(self._running.items()):
            prompt = running.player.prompt()
            room = None if self._limit is None else self._limit - len(prompt.ids)
            if room is not None and room <= 0:
                self._finish(slot, truncated="overlong")
                continue
            if prompt.shortened:
                self._shortened[prompt.shortened] += 1
            prompts[slot], requests[slot] = prompt, self._request(running, prompt, room)
        if not requests:
            return
        with self._clock("generation"):
            completions = dict(zip(requests, self._engine.generate(list(requests.values())), strict=True))

        responses: dict[int, Response] = {}
        for slot, completion in completions.items():
            if len(completion.ids) == 0:
                self._finish(slot, truncated="overlong")  # the prompt left no room for a single token
                continue
            responses[slot] = self._running[slot].player.respond(completion.ids)
        with self._clock("environment"):
            answers = self._pool.step({slot: response.action or "" for slot, response in responses.items()})
        for slot, response in responses.items():
            self._record(slot, prompts[slot], completions[slot], response, answers[slot])

    def stop(self) -> None:
        """Leave nothing behind in engine and pool (episodes are still running only if something raised)."""
        for running in self._running.values():
            self._engine.end(running.session)
        self._pool.release(list(self._running))

    def result(self) -> PlayedEpisodes:
        """What was played."""
        other = time.perf_counter() - self._started - sum(self._seconds.values())
        return PlayedEpisodes(self._episodes, {**self._seconds, "other": other}, dict(self._shortened))

    def _request(self, running: _Running, prompt: Prompt, room: int | None) -> Request:
        episode = running.episode
        sampling = self._sampling
        if room is not None and room < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=room)
        turn = len(episode.turns)
        return Request(
            session=running.session,
            prompt_ids=prompt.ids,
            sampling=sampling,
            seed=stream_seed("episode", self._seed, self._iteration, episode.task.id, episode.index, turn),
        )

    def _record(
        self, slot: int, prompt: Prompt, completion: Completion, response: Response, answer: Observation
    ) -> None:
        running = self._running[slot]
        episode, before = running.episode, running.observation
        if not episode.turns:
            episode.weight_version = completion.weight_version
        episode.turns.append(
            Turn(
                prompt_ids=prompt.appended,
                response_ids=np.asarray(completion.ids, np.int32),
                logps=np.asarray(completion.logps, np.float32),
                entropies=np.asarray(completion.entropies, np.float32),
                finish=completion.finish,
                observation=before.text,
                text=response.text,
                action=response.action,
                valid=response.valid,
                tool_call=response.tool_call,
                anchor=before.anchor or before.text,
                reward=answer.reward,
            )
        )
        episode.score += answer.reward
        episode.success = answer.won
        episode.answer = answer.answer
        running.observation = answer
        if answer.done:
            self._finish(slot)
        elif len(episode.turns) >= self._max_turns:
            self._finish(slot, truncated="turns")
        else:
            running.player.observe(answer)

    def _finish(self, slot: int, truncated: str = "") -> None:
        """The episode in ``slot`` is over, by its last observation or because it is ``truncated`` here."""
        running = self._running.pop(slot)
        episode, last = running.episode, running.observation
        if last.aborted is not None:
            episode.status, episode.reason, episode.success = "aborted", last.aborted, False
        elif truncated or (last.truncated and not (last.terminated or last.won)):
            episode.status, episode.reason = "truncated", truncated or "environment"
        self._engine.end(running.session)
        self._pool.release([slot])
        self._free.append(slot)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

"""The episodes of one rollout phase: what is played in which slot, from the first observation to the last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from spear_lightning.agents.base import Agent, AgentSession, Prompt, Response
from spear_lightning.engines.base import Completion, CompletionStream, Request, RolloutEngine, Sampling
from spear_lightning.environments.base import Observation
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.rollout.episode import Episode, Turn
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.utils.randomness import stream_seed


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What came of a list of specs.

    Attributes:
        episodes: one per spec, in the same order, aborted ones among them (``status == "aborted"``).
        seconds: wall-clock by phase: ``generation``, ``environment`` (waiting for them, while nothing was generated),
            ``other`` (prompts and parsing).
        shortened: number of prompts from which something had to be left out, by what it was.
    """

    episodes: list[Episode]
    seconds: dict[str, float]
    shortened: dict[str, int] = field(default_factory=dict)

    @property
    def aborted(self) -> list[Episode]:
        """Episodes whose environment failed: neither successes nor failures."""
        return [episode for episode in self.episodes if episode.status == "aborted"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all episodes of a phase.

    Attributes:
        sampling: of each response, the agent's stop tokens included.
        iteration: recorded in the episodes; names the random stream together with ``seed``.
        seed: of the run and split.
        max_turns: turns after which an episode is truncated.
        max_episode_tokens: length limit of an episode in ``conversation`` context; ``None`` has none.
    """

    sampling: Sampling
    iteration: int
    seed: int
    max_turns: int
    max_episode_tokens: int | None


@dataclass(slots=True)
class _Running:
    """An episode in a slot; its player begins with the first observation."""

    number: int
    episode: Episode
    session: str
    player: AgentSession | None = None
    observation: Observation = field(default_factory=lambda: Observation(""))
    prompt: Prompt | None = None
    answered: tuple[Completion, Response] | None = None


class EpisodeBatch:
    """Episodes, their environments and their prompts. A schedule says when each of its methods is called.

    An episode goes round: :meth:`begin`, then :meth:`observe` when its environment has answered, :meth:`requests` for
    its prompt, :meth:`act` with the completion, :meth:`observe` … until it is over and its slot is free.

    Args:
        specs: to play.
        pool: of environments.
        agent: bound to the policy's tokenizer.
        engine: that generates.
        rules: what holds for all episodes.
        on_step: called after observations have been taken in, with the number of episodes finished and still active.

    Attributes:
        specs: to play.
        engine: that generates.
    """

    def __init__(
        self,
        specs: Sequence[EpisodeSpec],
        pool: EnvironmentPool,
        agent: Agent,
        engine: RolloutEngine,
        rules: Rules,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.specs, self.engine = specs, engine
        self._pool, self._agent, self._rules, self._on_step = pool, agent, rules, on_step
        self._episodes = [Episode(spec.task, spec.group, spec.index, rules.iteration, agent.context) for spec in specs]
        self._running: dict[int, _Running] = {}
        self._slots: dict[str, int] = {}
        self._waiting = len(specs)
        self._shortened: Counter[str] = Counter()
        self._seconds = {"generation": 0.0, "environment": 0.0}
        self._started = time.perf_counter()

    # --- environments --------------------------------------------------------------------------------------------

    def begin(self, numbers: Mapping[int, int]) -> None:
        """Have episodes opened in free slots.

        Args:
            numbers: of the specs, by slot.
        """
        rules = self._rules
        for slot, number in numbers.items():
            episode = self._episodes[number]
            session = f"{rules.seed}/{rules.iteration}/{episode.group}/{episode.index}/{number}"
            self._running[slot], self._slots[session] = _Running(number, episode, session), slot
        self._waiting -= len(numbers)
        if numbers:
            with self._clock("environment"):
                self._pool.send_reset({slot: self._episodes[number].task for slot, number in numbers.items()})

    def gather(self, slots: Iterable[int]) -> dict[int, Observation]:
        """Wait until the environments in all these slots have answered."""
        with self._clock("environment"):
            return self._pool.gather(slots)

    def receive(self, wait: bool) -> dict[int, Observation]:
        """What environments have answered by now; ``wait`` for one at least."""
        with self._clock("environment"):
            return self._pool.receive(None if wait else 0.0)

    def observe(self, observations: Mapping[int, Observation]) -> list[int]:
        """Take in what environments have answered.

        Returns:
            Slots that are free now, their episodes being over.
        """
        over = [slot for slot, observation in sorted(observations.items()) if self._over(slot, observation)]
        if observations and self._on_step is not None:
            self._on_step(len(self._episodes) - self._waiting - len(self._running), len(self._running))
        return over

    # --- responses -----------------------------------------------------------------------------------------------

    def requests(self, slots: Iterable[int]) -> tuple[list[Request], list[int]]:
        """Prompts of episodes that have observed something.

        Returns:
            The requests, and slots that are free now because a prompt had no room for a response.
        """
        requests, over = [], []
        for slot in slots:
            running = self._running[slot]
            assert running.player is not None
            running.prompt = prompt = running.player.prompt()
            limit = self._rules.max_episode_tokens
            room = None if limit is None else limit - len(prompt.ids)
            if room is not None and room <= 0:
                self._finish(slot, truncated="overlong")
                over.append(slot)
                continue
            if prompt.shortened:
                self._shortened[prompt.shortened] += 1
            requests.append(self._request(running, prompt, room))
        return requests, over

    def generate(self, requests: Sequence[Request]) -> dict[str, Completion]:
        """Completions by session."""
        if not requests:
            return {}
        with self._clock("generation"):
            completions = self.engine.generate(requests)
        return {request.session: completion for request, completion in zip(requests, completions, strict=True)}

    def poll(self, stream: CompletionStream) -> dict[str, Completion]:
        """Let a stream go on for a moment."""
        with self._clock("generation"):
            return stream.poll()

    def act(self, completions: Mapping[str, Completion]) -> tuple[list[int], list[int]]:
        """Send the actions that responses mean.

        Args:
            completions: by session.

        Returns:
            Slots whose environments have been sent one, and slots that are free now because the prompt had left no room
            for a token.
        """
        actions, over = {}, []
        for session, completion in completions.items():
            slot = self._slots[session]
            running = self._running[slot]
            if len(completion.ids) == 0:
                self._finish(slot, truncated="overlong")
                over.append(slot)
                continue
            assert running.player is not None
            response = running.player.respond(completion.ids)
            running.answered = completion, response
            actions[slot] = response.action or ""
        if actions:
            with self._clock("environment"):
                self._pool.send_step(actions)
        return list(actions), over

    # --- the end -------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Leave nothing behind in engine and pool (episodes are still running only if something raised)."""
        for running in self._running.values():
            self.engine.end(running.session)
        self._pool.release(list(self._running))

    def result(self) -> RolloutResult:
        """What was played."""
        other = time.perf_counter() - self._started - sum(self._seconds.values())
        return RolloutResult(self._episodes, {**self._seconds, "other": other}, dict(self._shortened))

    # --- one episode ---------------------------------------------------------------------------------------------

    def _over(self, slot: int, observation: Observation) -> bool:
        running = self._running[slot]
        if running.player is None:
            running.observation = observation
            running.player = self._agent.start(running.episode.task, observation)
            if not observation.done:
                return False
            self._finish(slot)
            return True
        return self._record(slot, running, observation)

    def _request(self, running: _Running, prompt: Prompt, room: int | None) -> Request:
        episode, rules = running.episode, self._rules
        sampling = rules.sampling
        if room is not None and room < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=room)
        seed = stream_seed("episode", rules.seed, rules.iteration, episode.task.id, episode.index, len(episode.turns))
        return Request(running.session, prompt.ids, sampling, seed)

    def _record(self, slot: int, running: _Running, answer: Observation) -> bool:
        """Write down the turn that ``answer`` concludes; whether the episode is over by it."""
        assert running.answered is not None
        assert running.prompt is not None
        assert running.player is not None
        episode, before, (completion, response) = running.episode, running.observation, running.answered
        if not episode.turns:
            episode.weight_version = completion.weight_version
        episode.turns.append(
            Turn(
                prompt_ids=running.prompt.appended,
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
        elif len(episode.turns) >= self._rules.max_turns:
            self._finish(slot, truncated="turns")
        else:
            running.player.observe(answer)
            return False
        return True

    def _finish(self, slot: int, truncated: str = "") -> None:
        """The episode in ``slot`` is over, by its last observation or because it is ``truncated`` here."""
        running = self._running.pop(slot)
        del self._slots[running.session]
        episode, last = running.episode, running.observation
        if last.aborted is not None:
            episode.status, episode.reason, episode.success = "aborted", last.aborted, False
        elif truncated or (last.truncated and not (last.terminated or last.won)):
            episode.status, episode.reason = "truncated", truncated or "environment"
        self.engine.end(running.session)
        self._pool.release([slot])

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

"""What a rollout is made of: turns, episodes, and how an episode goes (:func:`play_episode`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spear_lightning.agents.base import Agent, Context, Prompt, Response
from spear_lightning.engines.base import Completion, Request, Sampling
from spear_lightning.environments.base import Observation, Split, Task
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import Positive, in_range

_Floats = npt.NDArray[np.float64]


def _none() -> _Floats:
    return np.zeros(0)


@dataclass(slots=True)
class Turn:
    """One response of the policy and what the environment made of it.

    Attributes:
        prompt_ids: int32. In ``stepwise`` context the whole prompt; in ``conversation`` only what was appended since
            the previous response (the first turn: the opening prompt).
        response_ids: generated token ids, int32 ``(tokens,)``, exactly as drawn.
        logps: behaviour log-probabilities, float32 ``(tokens,)``.
        entropies: policy entropy at each generated token in nats, float32 ``(tokens,)``.
        finish: ``"stop"`` or ``"length"`` (cut at the limit).
        observation: text the agent answered to.
        text: the response, decoded (for people and filters; never encoded again).
        action: what was sent to the environment; ``None`` for an unparsable turn.
        valid: the response had the required form (and, if so configured, an admissible action).
        tool_call: the turn used a tool (math), or acted on the environment (ALFWorld, WebShop).
        anchor: name of the state the turn started from (GiGPO).
        reward: the environment's reward of this step.
        shortened: what was left out of the prompt to keep its length limit (``agents.base.Prompt``)
    """

    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    finish: Literal["stop", "length"]
    observation: str
    text: str
    action: str | None
    valid: bool
    tool_call: bool
    anchor: str
    reward: float = 0.0
    shortened: str = ""


@dataclass(slots=True)
class Episode:
    """One attempt at a task; what follows ``weight_version`` is known once it is scored (``data/scoring.py``).

    Attributes:
        task: what was attempted.
        group: number of the task within the iteration, equal for the ``G`` episodes that attempted it, on any rank.
        index: number of the episode within its group.
        iteration: that it was played in.
        context: how training samples are made of it.
        turns: in order.
        score: sum of the environment's rewards.
        success: whether the task was solved.
        answer: what the agent has answered, where the task asks for an answer; else empty.
        status: ``"finished"``; ``"truncated"`` (turn or length limit); ``"aborted"`` (environment failed: neither a
            success nor a failure, never trained on).
        reason: why it was aborted or truncated, else empty.
        weight_version: of the policy that played it.
        reward: composed episode reward R (``algorithm.rewards``).
        parts: the parts that R is the sum of, by name: ``outcome``, ``tool`` (weighted by μ), ``format``.
        penalties: what each turn pays for itself, not negative, float64 ``(turns,)``.
        step_rewards: the environment's own reward of each turn, float64 ``(turns,)`` (GiGPO discounts these).
        filters: names of the quality filters that apply to any of its turns (``overlong``, ``incomplete``,
            ``repetitive``, ``unreadable``), empty if none.
        keep: one per turn; false takes the turn out of the loss.
        group_kept: false if the whole group was dropped (smallest reward deviation, or none).
        in_batch: false if the group carries no signal and others were sought in its place: it is dropped, and counts in
            nothing that is computed of the batch.
        advantages: one per turn, float64 ``(turns,)``; zeros until estimated.
        group_mean: mean R of the group.
        group_std: sample standard deviation of R in the group.
    """

    task: Task
    group: int
    index: int
    iteration: int
    context: Context
    turns: list[Turn] = field(default_factory=list)
    score: float = 0.0
    success: bool = False
    answer: str = ""
    status: Literal["finished", "truncated", "aborted"] = "finished"
    reason: str = ""
    weight_version: int = 0
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    penalties: _Floats = field(default_factory=_none)
    step_rewards: _Floats = field(default_factory=_none)
    filters: frozenset[str] = frozenset()
    keep: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    group_kept: bool = True
    in_batch: bool = True
    advantages: _Floats = field(default_factory=_none)
    group_mean: float = 0.0
    group_std: float = 0.0

    @property
    def tool_calls(self) -> int:
        """Turns that used a tool or acted on the environment (``n`` in R_tool)."""
        return sum(turn.tool_call for turn in self.turns)

    @property
    def samples(self) -> int:
        """Training samples that it is made into: one a turn in ``stepwise`` context, else one."""
        return len(self.turns) if self.context == "stepwise" else 1

    @property
    def invalid(self) -> int:
        """Turns whose response did not have the required form."""
        return sum(not turn.valid for turn in self.turns)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens the policy generated."""
        return sum(len(turn.response_ids) for turn in self.turns)

    def worth(self, turns: Sequence[int] | None = None) -> float:
        """R less the mean penalty of some turns: what a sample that is made of them is worth.

        Args:
            turns: their numbers; ``None`` for all.
        """
        penalties = self.penalties if turns is None else self.penalties[list(turns)]
        return self.reward - (float(penalties.mean()) if len(penalties) else 0.0)


class Rollout:
    """All episodes that this rank played in one phase.

    Not a dataclass: Lightning would look into it for tensors to move and to round.

    Attributes:
        split: which tasks were played.
        iteration: number of the SPEAR iteration (epoch) it belongs to.
        episodes: in the order in which they were asked for. Aborted ones are not among them.
        aborted: episodes whose environment failed: neither successes nor failures.
        seconds: wall-clock by phase: ``generation``, ``environment`` (waiting for them, while nothing was generated),
            ``sync`` (handing weights to the engine), ``other``.
    """

    __slots__ = ("aborted", "episodes", "iteration", "seconds", "split")

    def __init__(
        self,
        split: Split,
        iteration: int,
        episodes: list[Episode],
        aborted: list[Episode],
        seconds: dict[str, float],
    ) -> None:
        self.split: Split = split
        self.iteration = iteration
        self.episodes, self.aborted, self.seconds = episodes, aborted, seconds

    @classmethod
    def of(cls, split: Split, iteration: int, episodes: Sequence[Episode], seconds: dict[str, float]) -> Rollout:
        """Episodes that were played, aborted ones among them."""
        aborted = [episode for episode in episodes if episode.status == "aborted"]
        return cls(split, iteration, [e for e in episodes if e.status != "aborted"], aborted, seconds)

    def extend(self, other: Rollout) -> None:
        """Take in what this rank played next in the same phase, groups with larger numbers; seconds add up."""
        self.episodes += other.episodes
        self.aborted += other.aborted
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def to(self, device: object) -> Rollout:
        """Itself: there is nothing on a device. Lightning calls it for each batch."""
        return self


@in_range
@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """What holds for all episodes of a phase.

    Attributes:
        sampling: of each response, the agent's stop tokens included.
        seed: of the run and split; names the random stream together with the episode's iteration.
        max_turns: turns after which an episode is truncated.
        max_tokens: length limit of an episode in ``conversation`` context; ``None`` has none.
    """

    sampling: Sampling
    seed: int
    max_turns: Positive
    max_tokens: int | None


EpisodeCoroutine = Generator[Task | Request | str, Any, None]
"""Yields what an episode waits for, and is sent the answer: an :class:`Observation` to a task that an environment is to
be reset to and to an action, a :class:`Completion` to a request."""


def play_episode(episode: Episode, session: str, agent: Agent, rules: EpisodeRules) -> EpisodeCoroutine:
    """How an episode goes. The collector drives it, beside others.

    Args:
        episode: receives the turns and the outcome.
        session: its name at the engine.
        agent: bound to the policy's tokenizer.
        rules: that hold for it.
    """
    truncated = ""
    observation: Observation = yield episode.task
    player = agent.start(episode.task, observation)
    while not observation.done:
        prompt = player.prompt()
        request = _request(episode, session, prompt, rules)
        completion: Completion | None = (yield request) if request is not None else None
        if completion is None or not len(completion.ids):
            truncated = "overlong"
            break
        response = player.respond(completion.ids)
        answer: Observation = yield response.action or ""
        if not episode.turns:
            episode.weight_version = completion.weight_version
        episode.turns.append(_turn(observation, prompt, completion, response, answer))
        episode.score += answer.reward
        episode.success, episode.answer = answer.won, answer.answer
        observation = answer
        if not observation.done:
            if len(episode.turns) >= rules.max_turns:
                truncated = "turns"
                break
            player.observe(observation)
    if observation.aborted is not None:
        episode.status, episode.reason, episode.success = "aborted", observation.aborted, False
    elif truncated or (observation.truncated and not (observation.terminated or observation.won)):
        episode.status, episode.reason = "truncated", truncated or "environment"


def _request(episode: Episode, session: str, prompt: Prompt, rules: EpisodeRules) -> Request | None:
    """For the next response; ``None`` if the prompt leaves no room for one."""
    sampling = rules.sampling
    if rules.max_tokens is not None:
        room = rules.max_tokens - len(prompt.ids)
        if room <= 0:
            return None
        if room < sampling.max_new_tokens:
            sampling = replace(sampling, max_new_tokens=room)
    seed = stream_seed("episode", rules.seed, episode.iteration, episode.task.id, episode.index, len(episode.turns))
    return Request(session, prompt.ids, sampling, seed)


def _turn(before: Observation, prompt: Prompt, completion: Completion, response: Response, after: Observation) -> Turn:
    return Turn(
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
        reward=after.reward,
        shortened=prompt.shortened,
    )

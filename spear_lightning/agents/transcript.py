"""The conversation context: one append-only transcript per episode."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from spear_lightning.agents.base import ACTION_TAGS, Agent, AgentSession, Ids, Prompt, Response, without_task
from spear_lightning.environments.base import Observation, Task

_TAG = re.compile(r"</?\w+>")
_FIELD = re.compile(r"\{(task|observation)\}")


class TranscriptAgent(Agent):
    """Plays in one growing transcript, without a list of admissible actions.

    The model reads ``<task> put a mug on the desk <obs> You are in …`` and writes ``<action> go to desk 1 </action>``;
    the environment's answer is appended as ``<obs> You arrive at desk 1 …``, and so on. Lines of the first observation
    that repeat the task are left out.

    Args:
        opening: text before the first response; ``{task}`` and ``{observation}`` are filled in.
        continuation: text after each response; ``{observation}`` is filled in.
        options: of :class:`Agent`.

    Raises:
        ValueError: a template does not mention what it must.
    """

    context = "conversation"

    def __init__(
        self,
        opening: str = "<task> {task} <obs> {observation}",
        continuation: str = " <obs> {observation}",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, template in (("opening", opening), ("continuation", continuation)):
            if "{observation}" not in template:
                raise ValueError(f"agent.{name} must contain {{observation}}, but it is {template!r}")
        self.opening = opening
        self.continuation = continuation

    @property
    def tags(self) -> tuple[str, ...]:
        """The action tags and those of the templates."""
        return (*ACTION_TAGS, *_TAG.findall(self.opening + self.continuation))

    def start(self, task: Task, observation: Observation) -> TranscriptSession:
        """Begin an episode."""
        return TranscriptSession(self, observation)

    def opening_ids(self, task: str, observation: str) -> Ids:
        """Ids of what precedes the first response, int32 ``(tokens,)``."""
        return self.encode(self._fill(self.opening, task, without_task(observation, task)))

    def continuation_ids(self, observation: str) -> Ids:
        """Ids of what follows a response, int32 ``(tokens,)``."""
        return self.encode(self._fill(self.continuation, "", observation))

    def _fill(self, template: str, task: str, observation: str) -> str:
        fields = {"task": self.plain(task), "observation": self.plain(observation)}
        return _FIELD.sub(lambda match: fields[match[1]], template)


class TranscriptSession(AgentSession):
    """One episode of a :class:`TranscriptAgent`."""

    def __init__(self, agent: TranscriptAgent, observation: Observation) -> None:
        self._agent = agent
        self._admissible = observation.admissible
        self._appended = agent.opening_ids(observation.task, observation.text)
        self._ids = self._appended

    def prompt(self) -> Prompt:
        """The whole transcript."""
        return Prompt(self._ids, self._appended)

    def respond(self, ids: Ids) -> Response:
        """Append the response as it was drawn."""
        self._ids = np.concatenate([self._ids, ids])
        return self._agent.interpret(ids, self._admissible)

    def observe(self, observation: Observation) -> None:
        """Append the observation."""
        self._admissible = observation.admissible
        self._appended = self._agent.continuation_ids(observation.text)
        self._ids = np.concatenate([self._ids, self._appended])

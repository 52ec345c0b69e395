"""The stepwise context: each turn is its own prompt, with a short memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from spear_lightning.agents.base import (
    ACTION_TAGS,
    THINK_TAGS,
    Agent,
    AgentSession,
    Ids,
    Prompt,
    Response,
    without_task,
)
from spear_lightning.environments.base import Observation, Task
from spear_lightning.utils.ranges import NotNegative, Positive, in_range

_MOST_STEPS = 10**9  # a prompt that has left everything out still says how many steps were taken
_ROLE = "You carry out a task in a simulated world, which you can only read about and act on through text."
_THINK = "First reason about what to do next, between <think> and </think>. Then give "
_ANSWER = "your next action between <action> and </action>: exactly one"


@dataclass(frozen=True, slots=True)
class _Page:
    """What a prompt says; lists are already cut to what is shown."""

    task: str
    steps: int
    history: tuple[tuple[str, str], ...]
    observation: str
    admissible: tuple[str, ...]

    def text(self, role: str, think: bool) -> str:
        parts = [role]
        if self.task:
            parts.append(f"Your task: {self.task}")
        if self.steps:
            parts.append(f"You have taken {self.steps} {'step' if self.steps == 1 else 'steps'} so far.")
        if self.history:
            first = self.steps - len(self.history) + 1
            lines = [
                f"Step {first + number}. You read: {observation}\nYou did: {action}"
                for number, (observation, action) in enumerate(self.history)
            ]
            parts.append("\n".join(["The latest of them:", *lines]))
        parts.append(f"Now you read: {self.observation}")
        if self.admissible:
            parts.append("\n".join(["You can do one of these:", *(f"- {action}" for action in self.admissible)]))
        answer = _ANSWER + (" of those listed." if self.admissible else ".")
        parts.append(_THINK + answer if think else "Give " + answer)
        return "\n\n".join(parts)


@in_range
class StepwiseAgent(Agent):
    """Asks anew at each turn: role, task, steps taken, the last few of them, the observation, the admissible actions.

    The prompt goes through the tokenizer's chat template where it has one. A prompt that is too long loses, in this
    order and only as far as needed: history (oldest first), admissible actions (from the end of the list), the end of
    the observation. What had to go is reported with the prompt; a prompt never fails.

    Args:
        history_length: number of past steps that are shown.
        think: ask for reasoning in ``<think>…</think>`` before the action; a response without it is not valid.
        show_admissible: list the admissible actions (but for ``help``).
        max_prompt_tokens: length limit of the prompt.
        role: opening sentence of the prompt.
        template_args: further arguments of the chat template (for example ``enable_thinking: false``).
        options: of :class:`Agent`.

    Raises:
        ValueError: a number is out of range.
    """

    context = "stepwise"

    def __init__(
        self,
        history_length: NotNegative = 2,
        think: bool = True,
        show_admissible: bool = True,
        max_prompt_tokens: Positive = 2048,
        role: str = _ROLE,
        template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.history_length = history_length
        self.think = think
        self.show_admissible = show_admissible
        self.max_prompt_tokens = max_prompt_tokens
        self.role = role
        self.template_args = dict(template_args or {})

    @property
    def tags(self) -> tuple[str, ...]:
        """The action tags, and the think tags if they are asked for."""
        return (*THINK_TAGS, *ACTION_TAGS) if self.think else ACTION_TAGS

    @property
    @override
    def phrases(self) -> tuple[str, ...]:
        page = _Page("#", 2, (("#", "#"),), "#", ("#",) if self.show_admissible else ()).text(self.role, self.think)
        between = re.split(r"#|\d+|\n|" + "|".join(map(re.escape, (*THINK_TAGS, *ACTION_TAGS))), page)
        return tuple(dict.fromkeys(piece.strip().lower() for piece in between if piece.strip()))

    def response_ids(self, action: str) -> Ids:
        """Ids of a response as the model should write it, int32 ``(tokens,)``; thoughts are left empty."""
        ids = super().response_ids(action)
        return np.concatenate([self.encode(f" {' '.join(THINK_TAGS)}"), ids]) if self.think else ids

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use ``tokenizer`` from now on.

        Raises:
            ValueError: it cannot write the tags, cannot end a response, or an empty prompt exceeds the limit.
        """
        super().bind(tokenizer)
        bare = len(self._ids(_Page("", _MOST_STEPS, (), "", ())))
        self.check_prompt_limit(bare, self.max_prompt_tokens, "role")

    def start(self, task: Task, observation: Observation) -> StepwiseSession:
        """Begin an episode."""
        return StepwiseSession(self, observation)

    def prompt_of(
        self, task: str, steps: int, history: Sequence[tuple[str, str]], observation: str, admissible: Sequence[str]
    ) -> Prompt:
        """The prompt of one turn.

        Args:
            task: the instruction.
            steps: number of steps taken.
            history: pairs of observation and action, oldest first; the last ``history_length`` are shown.
            observation: to be answered.
            admissible: actions that the environment would accept.
        """
        shown = [action for action in admissible if action != "help"] if self.show_admissible else []
        page = _Page(
            task=self.plain(task),
            steps=steps,
            history=tuple(
                (self.plain(seen), self.plain(done))
                for seen, done in history[max(0, len(history) - self.history_length) :]
            ),
            observation=self.plain(observation),
            admissible=tuple(self.plain(action) for action in shown),
        )
        versions = ((self._ids(shorter), left_out) for shorter, left_out in _ever_shorter(page))
        # The last version is bare, and bind() made sure that it fits.
        ids, shortened = next((ids, left_out) for ids, left_out in versions if len(ids) <= self.max_prompt_tokens)
        return Prompt(ids, ids, shortened)

    def _ids(self, page: _Page) -> Ids:
        text = page.text(self.role, self.think)
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = str(
                self.tokenizer.apply_chat_template(
                    message, tokenize=False, add_generation_prompt=True, **self.template_args
                )
            )
        else:
            text += "\n\n"
        return self.encode(text)


def _ever_shorter(page: _Page) -> Iterator[tuple[_Page, str]]:
    """The page, then shorter and shorter versions of it, each with what it leaves out."""
    yield page, ""
    while page.history:
        page = replace(page, history=page.history[1:])
        yield page, "history"
    while page.admissible:
        page = replace(page, admissible=page.admissible[: len(page.admissible) * 3 // 4])
        yield page, "admissible"
    while page.observation:
        page = replace(page, observation=page.observation[: len(page.observation) * 3 // 4])
        yield page, "observation"
    # Only a task that is longer than the whole prompt may be comes this far.
    while page.task:
        page = replace(page, task=page.task[: len(page.task) * 3 // 4])
        yield page, "task"


class StepwiseSession(AgentSession):
    """One episode of a :class:`StepwiseAgent`."""

    def __init__(self, agent: StepwiseAgent, observation: Observation) -> None:
        self._agent = agent
        self._task = observation.task
        self._text = without_task(observation.text, observation.task)
        self._admissible = observation.admissible
        self._history: list[tuple[str, str]] = []

    def prompt(self) -> Prompt:
        """The prompt of this turn."""
        return self._agent.prompt_of(self._task, len(self._history), self._history, self._text, self._admissible)

    def respond(self, ids: Ids) -> Response:
        """Remember the action as text; the response itself is not shown again."""
        response = self._agent.interpret(ids, self._admissible, self._agent.think)
        self._history.append((self._text, response.action or "nothing that could be understood"))
        return response

    def observe(self, observation: Observation) -> None:
        """Turn to the next observation."""
        self._text = observation.text
        self._admissible = observation.admissible

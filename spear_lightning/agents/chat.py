"""The conversation context through the tokenizer's own chat template: one append-only list of tokens per episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from spear_lightning.agents.base import Agent, AgentSession, Ids, Prompt, Response, without_task
from spear_lightning.agents.chat_template import ChatFormat, Message
from spear_lightning.environments.base import Observation, Task
from spear_lightning.utils.ranges import Positive, in_range

_SYSTEM = (
    "You carry out a task in a simulated world, which you can only read about and act on through text. Answer each "
    "message with one action between <action> and </action>."
)
_END_OF_MESSAGE = "<|eom_id|>"  # Llama 3.1 ends a message that calls a tool with it


@in_range
class ChatAgent(Agent):
    """Plays as a chat: observations are messages of the user, responses those of the assistant.

    Args:
        system: message of the system that opens the chat; empty for none.
        max_prompt_tokens: length limit of what precedes the first response; a longer first observation is cut.
        template_args: further arguments of the chat template (for example ``enable_thinking: false``).
        options: of :class:`Agent`.

    Raises:
        ValueError: a limit is not positive.
    """

    context = "conversation"

    def __init__(
        self,
        system: str = _SYSTEM,
        max_prompt_tokens: Positive = 2048,
        template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.system = system
        self.max_prompt_tokens = max_prompt_tokens
        self.template_args = dict(template_args or {})
        self._format: ChatFormat | None = None

    @property
    def format(self) -> ChatFormat:
        """The pieces of the tokenizer's chat template.

        Raises:
            RuntimeError: :meth:`bind` was not called.
        """
        if self._format is None:
            raise RuntimeError("the agent has no tokenizer yet: call agent.bind(tokenizer) first")
        return self._format

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools that the template is told of."""
        return []

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens after which the template need not end the message again."""
        ids = (self.format.end_id, self.tokenizer.get_vocab().get(_END_OF_MESSAGE))
        return tuple(sorted({token for token in ids if token is not None}))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: those of every agent, and those that end a message in the chat template."""
        return tuple(sorted({*super().stop_ids, *(self.ends if self._format is not None else ())}))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use ``tokenizer`` from now on.

        Raises:
            ValueError: it has no chat template or one that cannot do what is asked, cannot write the tags, or cannot
                end a response; or an empty prompt exceeds the limit.
        """
        self._tokenizer = tokenizer
        self._format = ChatFormat(tokenizer, self.schemas, self.template_args)
        super().bind(tokenizer)
        self.check_prompt_limit(len(self.opening_ids("")), self.max_prompt_tokens, "system")

    def start(self, task: Task, observation: Observation) -> ChatSession:
        """Begin an episode."""
        return ChatSession(self, observation)

    def opening_ids(self, text: str) -> Ids:
        """Ids of what precedes the first response, int32 ``(tokens,)``."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return self.encode(self.format.opening([*messages, {"role": "user", "content": self.plain(text)}]))

    def opening(self, task: str, observation: str) -> Prompt:
        """The first prompt; where it is too long, the end of the observation is left out."""
        text = "\n\n".join(part for part in (task, without_task(observation, task)) if part)
        text, shortened = text[: self.max_observation_characters], ""
        while len(ids := self.opening_ids(text)) > self.max_prompt_tokens and text:
            text, shortened = text[: len(text) * 3 // 4], "observation"
        return Prompt(ids, ids, shortened)

    def continuation_ids(self, response: Ids, observation: str) -> Ids:
        """Ids of what stands between a response and the next one, int32 ``(tokens,)``.

        Args:
            response: ids as they were drawn.
            observation: that answers it.
        """
        ended = len(response) > 0 and int(response[-1]) in self.ends
        return self.encode(self.format.continuation(self.answers(observation), ended))

    def answers(self, observation: str) -> list[Message]:
        """The messages that an observation becomes."""
        return [{"role": "user", "content": self.plain(observation)}]

    def written(self, ids: Ids) -> str:
        """What a response says, without the token that ended it."""
        return self.decode(ids[:-1] if len(ids) and int(ids[-1]) in self.stop_ids else ids)

    def understand(self, ids: Ids, observation: Observation) -> Response:
        """What a response means.

        Args:
            ids: generated, int32 ``(tokens,)``.
            observation: that it answers.
        """
        return self.interpret(ids, observation.admissible)


class ChatSession(AgentSession):
    """One episode of a :class:`ChatAgent`."""

    def __init__(self, agent: ChatAgent, observation: Observation) -> None:
        self._agent = agent
        self._observation = observation
        self._response: Ids = np.zeros(0, np.int32)
        self._prompt = agent.opening(observation.task, observation.text)

    def prompt(self) -> Prompt:
        """The whole conversation."""
        return self._prompt

    def respond(self, ids: Ids) -> Response:
        """Keep the response as it was drawn."""
        self._response = ids
        return self._agent.understand(ids, self._observation)

    def observe(self, observation: Observation) -> None:
        """Append the response and the observation."""
        self._observation = observation
        appended = self._agent.continuation_ids(self._response, observation.text)
        self._prompt = Prompt(np.concatenate([self._prompt.ids, self._response, appended]), appended)

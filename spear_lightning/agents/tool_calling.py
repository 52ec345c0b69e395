"""An agent that calls tools through the chat template of its model, for mathematics with a code interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spear_lightning.agents.base import Ids, Response
from spear_lightning.agents.chat import ChatAgent
from spear_lightning.agents.chat_template import Message
from spear_lightning.environments.base import Observation
from spear_lightning.environments.tools import (
    CALL_TAGS,
    CODE_INTERPRETER,
    RESULT_TAGS,
    Tool,
    parse_calls,
    read_results,
)

_SYSTEM = "You are a careful mathematician."


class ChatToolAgent(ChatAgent):
    r"""Plays as a chat with tools: a response either calls tools or is the final answer.

    The tools are told, the calls written and their results shown as the chat template of the model has it. The action
    is the response itself: the environment reads the calls with the same function as this agent does
    (:func:`~spear_lightning.environments.tools.parse_calls`). A call that cannot be made is answered to the model by
    the environment; the response is then not valid.

    Args:
        tools: that the model may call; the environment must have them too. ``None`` is the code interpreter; an empty
            list plays without.
        system: message of the system that opens the chat; empty for none.
        answer_mark: a final answer without it is no answer at all (an unparsable turn); empty takes anything for one.
        max_prompt_tokens: of what precedes the first response; a longer first observation is cut.
        template_args: further arguments of the chat template.
        max_action_characters: a longer response is cut before it is read: at its end where it calls tools, else at its
            beginning.
        max_observation_characters: of one result.

    Raises:
        ValueError: a limit is not positive, or two tools have one name.
    """

    def __init__(
        self,
        tools: Sequence[Tool] | None = None,
        system: str = _SYSTEM,
        answer_mark: str = "\\boxed",
        max_prompt_tokens: int = 2048,
        template_args: Mapping[str, Any] | None = None,
        max_action_characters: int = 200_000,
        max_observation_characters: int = 16_000,
    ) -> None:
        super().__init__(
            system=system,
            max_prompt_tokens=max_prompt_tokens,
            template_args=template_args,
            lowercase=False,
            max_action_characters=max_action_characters,
            max_observation_characters=max_observation_characters,
        )
        self.tools = (CODE_INTERPRETER,) if tools is None else tuple(tools)
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError(f"agent.tools names a tool twice: {', '.join(names)}")
        self.answer_mark = answer_mark

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """JSON schemas of the tools."""
        return [tool.schema() for tool in self.tools]

    @property
    def has_tools(self) -> bool:
        """Whether there are any."""
        return bool(self.tools)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags around calls and results: no result may spell them."""
        return (*CALL_TAGS, *RESULT_TAGS) if self.tools else ()

    def answers(self, observation: str) -> list[Message]:
        """One message of a tool per result; plain text becomes a message of the user."""
        results = read_results(observation) if self.tools else None
        if results is None:
            return super().answers(observation)
        return [{"role": "tool", "name": name, "content": self.plain(content)} for name, content in results]

    def understand(self, ids: Ids, observation: Observation) -> Response:
        """What a response means.

        Args:
            ids: generated, int32 ``(tokens,)``.
            observation: that it answers.

        Returns:
            ``tool_call`` is true if at least one well-formed call of a known tool was made. ``action`` is ``None``
            where there is neither a call, well-formed or not, nor an answer.
        """
        text = self.written(ids)
        limit = self.max_action_characters
        if len(text) > limit:
            text = text[:limit] if parse_calls(text, self.tools) else text[-limit:]
        # Of the text as it is sent, so that the environment finds the same calls.
        calls = parse_calls(text, self.tools) if self.tools else []
        well_formed = [not call.error for call in calls]
        answered = bool(text.strip()) and self.answer_mark in text
        return Response(
            text=self.decode(ids),
            action=text if calls or answered else None,
            valid=all(well_formed) if calls else answered,
            tool_call=any(well_formed),
        )

"""The pieces of a chat template that stand between a model's responses, found by rendering and never by rule.

A template only renders whole conversations. What it would put before the first response is what it renders for the
opening messages; what it would put between one response and the next is what it renders after a response that is known
word for word. So no template needs to be known here, and no response is ever rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# Stands for a response while the text around it is looked for. Only ASCII letters: nothing that a template would
# escape, trim or take for markup.
_MARK = "SpearLightningResponse"
_PROBE = "SpearLightningProbe"


class ChatFormat:
    """The chat template of one tokenizer, with one set of tools.

    Args:
        tokenizer: with a chat template.
        tools: JSON schemas, as templates expect them in ``tools``; empty for none.
        template_args: further arguments of the template (``enable_thinking: false``).

    Attributes:
        end: text of the token that ends a response (``<|im_end|>``); empty if the template puts none.
        end_id: its id, if it is one token.

    Raises:
        ValueError: there is no template, or it cannot do what is asked; the message names the fix.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._arguments = tokenizer, template_args or {}
        self._tools: list[dict[Any, Any] | Callable[..., Any]] = [dict(tool) for tool in tools]
        self._name = f"the tokenizer of the policy ({tokenizer.name_or_path or type(tokenizer).__name__})"
        if not tokenizer.chat_template:
            raise ValueError(
                f"{self._name} has no chat template: use an instruction-tuned model, or put a template that the model "
                "was trained with into its folder as chat_template.jinja"
            )
        self._check_tools(tools)
        rest = self._after([])
        ids = tokenizer.encode(rest, add_special_tokens=False)
        added = tokenizer.added_tokens_decoder
        self.end_id = ids[0] if ids and ids[0] in added else None
        self.end = "" if self.end_id is None else added[self.end_id].content
        if not rest.startswith(self.end):
            self.end, self.end_id = "", None

    def opening(self, messages: Sequence[Message]) -> str:
        """What precedes the first response.

        Args:
            messages: of the system and the user.
        """
        return self._render(messages, generate=True)

    def continuation(self, messages: Sequence[Message], ended: bool) -> str:
        """What stands between a response and the next one.

        Args:
            messages: that answer the response.
            ended: whether the response ends with the token :attr:`end`.
        """
        text = self._after(messages)
        return text.removeprefix(self.end) if ended else text

    def _after(self, messages: Sequence[Message]) -> str:
        """What is rendered after a response that ``messages`` answer; without any, what ends it."""
        before = [{"role": "user", "content": "."}, {"role": "assistant", "content": _MARK}]
        text = self._render([*before, *messages], generate=bool(messages))
        # The first one: what the messages say comes later, and may spell the mark too.
        _, found, after = text.partition(_MARK)
        if not found:
            raise ValueError(f"{self._name}: its chat template does not render what an assistant says; use another")
        return after

    def _check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        if not tools:
            return
        name = str(tools[0]["function"]["name"])
        fix = "use a model whose template supports tools (Qwen2.5-Instruct does), or set agent.tools to []"
        if name not in self._render([{"role": "user", "content": "."}], generate=True):
            raise ValueError(f"{self._name}: its chat template does not mention the tools it is given: {fix}")
        try:
            after = self._after([{"role": "tool", "name": name, "content": _PROBE}])
        except ValueError as error:
            raise ValueError(f"{error}: {fix}") from error
        if _PROBE not in after:
            raise ValueError(f"{self._name}: its chat template leaves out messages of the role tool: {fix}")

    def _render(self, messages: Sequence[Message], generate: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools or None,
                tokenize=False,
                add_generation_prompt=generate,
                **self._arguments,
            )
        except Exception as error:  # a template raises whatever it likes
            roles = ", ".join(message["role"] for message in messages)
            hint = "; if it knows no system, set agent.system to an empty text" if "system" in roles else ""
            raise ValueError(
                f"{self._name}: its chat template refuses a conversation of {roles}: {type(error).__name__}: "
                f"{error}{hint}"
            ) from error
        return str(text)

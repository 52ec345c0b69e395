"""Function tools as both ends see them: how a model's message calls them, and how their results travel back.

An agent and an environment must agree on what a message means, so both read it with the same pure functions. What the
agent sends as its action is the text of the message itself, which loses nothing; what the environment answers to calls
is a list of results in JSON. Model output is hostile: whatever is written, reading it takes linear time and ends in
calls, errors that can be told to the model, or a final answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jsonschema import Draft202012Validator, SchemaError

CALL_TAGS = ("<tool_call>", "</tool_call>")
RESULT_TAGS = ("<tool_response>", "</tool_response>")
MAX_CALLS = 8  # of one message; the others are refused
MAX_CALL_CHARACTERS = 65_536
_PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may open a call with it
_SHOWN_CHARACTERS = 80  # of what the model wrote, in an error message


@dataclass(frozen=True)
class Tool:
    """A function that a model can call.

    Args:
        name: of the function.
        description: for the model.
        parameters: JSON schema (draft 2020-12) of the arguments: an object with ``properties``, each with a ``type``.
            Arguments that it does not describe are refused unless ``additionalProperties`` says otherwise.

    Raises:
        ValueError: the schema is not of that form; the message names the tool.
    """

    name: str
    description: str
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}, "required": []})

    def __post_init__(self) -> None:
        properties = self.parameters.get("properties")
        if not self.name or not isinstance(properties, Mapping):
            raise ValueError(f"the tool {self.name!r} needs a name and parameters with `properties` (a JSON schema)")
        try:
            Draft202012Validator.check_schema(self.parameters)
        except SchemaError as error:
            raise ValueError(f"the parameters of the tool {self.name} are no JSON schema: {error.message}") from error
        for key, schema in properties.items():
            if not isinstance(schema, Mapping) or "type" not in schema:
                raise ValueError(f"the tool {self.name}: parameter {key} needs a type")
        if unknown := set(self.parameters.get("required", ())) - set(properties):
            raise ValueError(f"the tool {self.name} requires {', '.join(sorted(unknown))}, which it does not describe")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tool, (self.name, self.description, self.parameters)  # validators cannot be pickled

    @cached_property
    def _validator(self) -> Draft202012Validator:
        # In this order errors are told: what is missing, what is wrong, what is unknown.
        first = {"required": (), "properties": {}, "additionalProperties": False}
        return Draft202012Validator(first | self.parameters)

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """What is wrong with a call's arguments, in words for the model; empty if nothing is.

        >>> CODE_INTERPRETER.problem({"code": 7})
        'the argument code of code_interpreter must be of type string'
        """
        try:
            error = next(self._validator.iter_errors(arguments), None)
        except (ArithmeticError, RecursionError, ValueError):  # 1e999, NaN, brackets nested a thousand deep
            return f"the arguments of {self.name} hold a number that is too large or are nested too deeply"
        if error is None:
            return ""
        path = _cut(".".join(map(str, error.path)))
        if error.validator == "required":
            missing = next(key for key in error.validator_value if key not in error.instance)
            return f"{self.name} needs the argument {path}{'.' if path else ''}{missing}"
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            extra = next(key for key in error.instance if key not in known)
            return f"{self.name} has no argument {_shown(extra)}; it takes: {', '.join(known)}"
        where = f"the argument {path} of {self.name}" if path else f"the call of {self.name}"
        if error.validator == "type":
            wanted = error.validator_value
            return f"{where} must be of type {wanted if isinstance(wanted, str) else ' or '.join(wanted)}"
        return f"{where} does not satisfy {error.validator}: {_cut(str(error.validator_value))}"

    def schema(self) -> dict[str, Any]:
        """As chat templates expect it in ``tools``."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


CODE_INTERPRETER = Tool(
    name="code_interpreter",
    description="Runs a Python program and returns what it prints. Nothing is kept from one call to the next.",
    parameters={
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The program; print what you want to see."}},
        "required": ["code"],
    },
)


@dataclass(frozen=True)
class ToolCall:
    """One call in a message.

    Attributes:
        name: of the tool; empty where it could not be read.
        arguments: by name.
        error: why the call cannot be made, in words for the model; empty for a well-formed call of a known tool.
    """

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def parse_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """The tool calls in a message of a model; none makes it a final answer.

    Two ways of writing them are known: any number of ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` (Hermes,
    Qwen), or a message that is nothing but ``{"name": …, "parameters": {…}}`` (Llama 3).

    Args:
        text: of the message, without the token that ended it.
        tools: that can be called.

    Returns:
        In order, at most ``MAX_CALLS`` + 1; calls that cannot be made carry an error.
    """
    if CALL_TAGS[0] in text:
        return _tagged_calls(text, tools)
    bare = text.strip().removeprefix(_PYTHON_TAG).strip()
    if not bare.startswith("{"):
        return []
    content, end, error = _read_json(bare, 0)
    if error:
        # Text may open with a brace; only what began as a call is taken for one.
        return [ToolCall(error=error)] if bare[1:].lstrip().startswith('"name"') else []
    called = isinstance(content, dict) and "name" in content and ("parameters" in content or "arguments" in content)
    return [_check(content, tools, end)] if called and end == len(bare) else []


def _tagged_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    opening, closing = CALL_TAGS
    position = 0
    while (start := text.find(opening, position)) >= 0:
        if len(calls) == MAX_CALLS:
            return [*calls, ToolCall(error=f"a message can make {MAX_CALLS} calls; those after them were not made")]
        start += len(opening)
        content, end, error = _read_json(text, start)
        after = end + len(text[end : end + 256]) - len(text[end : end + 256].lstrip())
        if not error and text.startswith(closing, after):
            # The tag is looked for after the JSON: code may well spell it inside a string.
            calls.append(_check(content, tools, end - start))
            position = after + len(closing)
            continue
        found = text.find(closing, start)
        if found < 0:
            return [*calls, ToolCall(error=f"a tool call was not closed by {closing}, or the message was too long")]
        calls.append(ToolCall(error=error or f"a tool call must be one JSON object between {opening} and {closing}"))
        position = found + len(closing)
    return calls


def _read_json(text: str, start: int) -> tuple[Any, int, str]:
    """The JSON value at ``start`` (after white space), where it ends, and an error if there is none."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    try:
        content, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError as error:
        return None, start, f"the tool call is not valid JSON: {error.msg} (character {max(0, error.pos - start)})"
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets nested a thousand deep
        return None, start, "the tool call is not valid JSON: a number is too long or the nesting too deep"
    return content, end, ""


def _check(content: Any, tools: Sequence[Tool], length: int) -> ToolCall:
    """The call that a JSON value of ``length`` characters makes."""
    if length > MAX_CALL_CHARACTERS:
        return ToolCall(error=f"the tool call has {length} characters; at most {MAX_CALL_CHARACTERS} are accepted")
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return ToolCall(error='a tool call must be a JSON object with "name" (text) and "arguments" (an object)')
    name = content["name"]
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        known = ", ".join(tool.name for tool in tools) or "none"
        return ToolCall(error=f"there is no tool {_shown(name)}; the tools are: {known}")
    arguments = content.get("arguments", content.get("parameters"))
    if not isinstance(arguments, dict):
        return ToolCall(name, error=f'the "arguments" of {name} must be a JSON object')
    return ToolCall(name, error=problem) if (problem := tool.problem(arguments)) else ToolCall(name, arguments)


def _shown(text: str) -> str:
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def write_results(results: Sequence[tuple[str, str]]) -> str:
    """An observation that carries the results of tool calls.

    Args:
        results: pairs of tool name and result, in order of the calls.
    """
    messages = [{"role": "tool", "name": name, "content": content} for name, content in results]
    return json.dumps(messages, ensure_ascii=False)


def read_results(observation: str) -> list[tuple[str, str]] | None:
    """The results in an observation; ``None`` for an observation that is plain text.

    An environment that does not write results with :func:`write_results` has no business with tools.
    """
    if not observation.startswith('[{"role": "tool"'):
        return None
    try:
        messages = json.loads(observation)
        return [(str(message["name"]), str(message["content"])) for message in messages]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None

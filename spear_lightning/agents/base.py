"""What stands between a language model and a text environment: prompts out of observations, actions out of responses.

Token rule: what the model generated is never decoded and encoded again. A response enters the context as the very ids
that were drawn; only the text between responses is tokenised, on its own. So the log-probabilities that training
computes belong to the tokens that were played.

The text of an environment is not trusted either: special tokens spelled out in it are taken apart before it is
tokenised, so that no web page or game can close a chat turn or open an action.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from spear_lightning.environments.base import Observation, Task
from spear_lightning.utils.ranges import Positive, in_range

Context = Literal["conversation", "stepwise"]
"""What a prompt holds: all of the episode so far (one training sample an episode), or a window of it (one a turn)."""

Ids = npt.NDArray[np.int32]

ACTION_TAGS = ("<action>", "</action>")
THINK_TAGS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is asked to continue.

    Attributes:
        ids: the full prompt, int32 ``(tokens,)``.
        appended: what a turn records of it: in ``conversation`` context the part since the previous response, in
            ``stepwise`` context all of it.
        shortened: what had to be left out to keep the length limit (``"history"``, ``"admissible"``,
            ``"observation"``), else empty.
    """

    ids: Ids
    appended: Ids
    shortened: str = ""


@dataclass(frozen=True, slots=True)
class Response:
    """What a response of the model means.

    Attributes:
        text: the response, decoded.
        action: what to send to the environment; ``None`` where nothing could be parsed. The environment is then sent an
            empty action: it answers as it answers any nonsense, and the step counts.
        valid: it had the required form (and, if so configured, an admissible action).
        tool_call: the environment was acted on.
    """

    text: str
    action: str | None
    valid: bool
    tool_call: bool


class AgentSession(ABC):
    """An agent in one episode; called in turn: :meth:`prompt`, :meth:`respond`, :meth:`observe`, :meth:`prompt`."""

    @abstractmethod
    def prompt(self) -> Prompt:
        """The prompt for the next response."""

    @abstractmethod
    def respond(self, ids: Ids) -> Response:
        """Take in the ids that the model generated, int32 ``(tokens,)``, the stop token included."""

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Take in what the environment answered to the action."""


@in_range
class Agent(ABC):
    """Turns observations into prompts and responses into actions, for any number of episodes.

    Args:
        require_admissible: a response is valid only if its action is among those the environment says it would accept
            (where it says so; the prompt need not show them).
        lowercase: lower the case of actions.
        max_action_characters: a longer action is not sent: the turn counts as unparsable.
        max_observation_characters: a longer observation is cut at its end.

    Attributes:
        context: how training samples are made of the episodes (:data:`Context`).
    """

    context: ClassVar[Context]

    def __init__(
        self,
        require_admissible: bool = False,
        lowercase: bool = True,
        max_action_characters: Positive = 256,
        max_observation_characters: Positive = 16_000,
    ) -> None:
        self.require_admissible = require_admissible
        self.lowercase = lowercase
        self.max_action_characters = max_action_characters
        self.max_observation_characters = max_observation_characters
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._specials = re.compile(r"(?!)")  # nothing, until the tokenizer is known

    @abstractmethod
    def start(self, task: Task, observation: Observation) -> AgentSession:
        """Begin an episode of ``task`` that opened with ``observation``."""

    @property
    def tags(self) -> tuple[str, ...]:
        """What the tokenizer must be able to write and read back, and the environment must not say."""
        return ACTION_TAGS

    @property
    def phrases(self) -> tuple[str, ...]:
        """What its prompts say beside observations; a tokenizer made for it may take each for one token."""
        return ()

    @property
    def has_tools(self) -> bool:
        """Whether there are tools that a success should have used; acting on a world is such a use."""
        return True

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer.

        Raises:
            RuntimeError: :meth:`bind` was not called.
        """
        if self._tokenizer is None:
            raise RuntimeError("the agent has no tokenizer yet: call agent.bind(tokenizer) first")
        return self._tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: end of text, and the tag that closes an action where it is a token."""
        tokenizer = self.tokenizer
        closing: Any = tokenizer.convert_tokens_to_ids(ACTION_TAGS[1])  # the unknown token's where there is none
        known = closing is not None and tokenizer.convert_ids_to_tokens(closing) == ACTION_TAGS[1]
        ids = {tokenizer.eos_token_id, closing if known else None}
        return tuple(sorted(token for token in ids if token is not None))

    @property
    def pad_id(self) -> int:
        """Token that short rows are filled up with (it is masked everywhere)."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0])

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Use ``tokenizer`` from now on.

        Raises:
            ValueError: it cannot write the tags, or has no token that could end a response.
        """
        self._tokenizer = tokenizer
        # Not all_special_tokens: it leaves out <|im_start|>; and <tool_call> is not marked as special at all.
        added = tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special or token.content.startswith("<")}
        # The longest first: a special token may begin with another one.
        specials = sorted({*control, *self.tags} - {""}, key=lambda token: (-len(token), token))
        self._specials = re.compile("|".join(map(re.escape, specials)), re.IGNORECASE)
        name = f"the tokenizer of the policy ({tokenizer.name_or_path or type(tokenizer).__name__})"
        for tag in self.tags:
            ids = tokenizer.encode(tag, add_special_tokens=False)
            unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
            if unknown or tag not in self.decode(np.asarray(ids, np.int32)):
                raise ValueError(
                    f"{name} cannot write the tag {tag} that {type(self).__name__} needs: add it as a special "
                    "token, or use a tokenizer that can spell any text"
                )
        if not self.stop_ids:
            raise ValueError(f"{name} has neither an end-of-text token nor a token {ACTION_TAGS[1]}: add one of them")

    def check_prompt_limit(self, bare: int, limit: int, shorten: str) -> None:
        """Refuse a prompt limit that leaves no room for an observation.

        Args:
            bare: tokens of a prompt that says nothing yet.
            limit: ``max_prompt_tokens``.
            shorten: argument that could be shorter.

        Raises:
            ValueError: there is no room; names both arguments.
        """
        if bare >= limit:
            raise ValueError(
                f"agent.max_prompt_tokens is {limit}, but a prompt has {bare} tokens before it says anything: raise "
                f"the limit, or shorten agent.{shorten}"
            )

    def encode(self, text: str) -> Ids:
        """Ids of a piece of text, int32 ``(tokens,)``, with nothing added at its ends."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)

    def response_ids(self, action: str) -> Ids:
        """Ids of a response as the model should write it, stop token included, int32 ``(tokens,)``."""
        ids = self.encode(f" {ACTION_TAGS[0]} {self.plain(action)} {ACTION_TAGS[1]}")
        return ids if ids[-1] in self.stop_ids else np.append(ids, np.int32(self.stop_ids[0]))

    def decode(self, ids: Ids) -> str:
        """Text of generated ids, for people and for parsing."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def plain(self, text: str) -> str:
        """Text of the environment made safe to tokenise: valid Unicode, of bounded length, without special tokens."""
        text = text[: self.max_observation_characters].encode("utf-8", "replace").decode("utf-8")
        return self._specials.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def interpret(self, ids: Ids, admissible: tuple[str, ...], think: bool = False) -> Response:
        """What a response means.

        Args:
            ids: generated, int32 ``(tokens,)``.
            admissible: actions the environment would accept now; empty where it does not tell.
            think: a pair of think tags is required too.
        """
        text = self.decode(ids)
        action = parse_action(text, self.max_action_characters, self.lowercase)
        valid = action is not None and (not think or between(text, THINK_TAGS) is not None)
        if self.require_admissible and admissible:
            valid = valid and action in admissible
        return Response(text, action, valid, tool_call=action is not None)


def parse_action(text: str, max_characters: int = 256, lowercase: bool = True) -> str | None:
    """The action in a response: the stripped text of its first pair of action tags.

    Returns:
        ``None`` where there is no pair, nothing in it, another opening tag in it, or more than ``max_characters``.
    """
    action = (between(text, ACTION_TAGS) or "").strip()
    if not action or len(action) > max_characters or ACTION_TAGS[0] in action.lower():
        return None
    return action.lower() if lowercase else action


def between(text: str, tags: tuple[str, str]) -> str | None:
    """What stands in the first pair of ``tags`` (in any case); ``None`` if there is no pair."""
    # Two searches, not one pattern "open.*?close": that takes quadratic time on a thousand opening tags.
    opening = re.search(re.escape(tags[0]), text, re.IGNORECASE)
    if opening is None:
        return None
    closing = re.compile(re.escape(tags[1]), re.IGNORECASE).search(text, opening.end())
    return None if closing is None else text[opening.end() : closing.start()]


def without_task(text: str, task: str) -> str:
    """An observation without the lines that repeat the task, which a prompt states in a place of its own."""
    if not task:
        return text
    return "\n".join(line for line in text.splitlines() if task not in line).strip() or text

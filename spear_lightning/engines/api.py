"""A model behind an OpenAI-compatible address, to be evaluated on the same tasks as one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.utils.http import NoAnswerError, StatusError, ask, persist

if TYPE_CHECKING:
    from spear_lightning.policy.policy import Policy


@dataclass(frozen=True)
class _Answer:
    text: str
    stopped: bool


class APIEngine(RolloutEngine):
    """Asks a server for responses, for ``validate``, ``test`` and ``predict``. It cannot train: it has no log-probs.

    Prompts are sent as text: the server's model has a tokenizer of its own. ``model.policy`` only lends its tokenizer,
    which writes the prompts and reads the answers, so agents that speak plain tags need nothing of the server's.

    Args:
        address: of the API, up to and including the version (``http://localhost:8000/v1``).
        model: name of the model there.
        endpoint: ``chat`` sends a prompt as one message of a user; ``completions`` sends it as it is, for agents that
            write the server's own chat template.
        key: environment variable that holds the key; unset or empty sends none.
        parallel: requests under way at a time.
        retries: of a request that failed in a way that may pass (connection, time-out, status 429 or 5xx), with pauses
            that double.
        seconds: after which an unanswered request has failed.
        options: further fields of every request (``{"reasoning_effort": "low"}``).

    Raises:
        ValueError: an argument is out of range.
    """

    trains = False

    def __init__(
        self,
        address: str,
        model: str,
        endpoint: Literal["chat", "completions"] = "chat",
        key: str = "OPENAI_API_KEY",
        parallel: int = 16,
        retries: int = 4,
        seconds: float = 120.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"engine.address must begin with http:// or https://, not {address!r}")
        for name, value, least in (("parallel", parallel, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"engine.{name} must be at least {least}, not {value}")
        if seconds <= 0:
            raise ValueError(f"engine.seconds must be above 0, not {seconds}")
        self.address, self.model, self.endpoint = address.rstrip("/"), model, endpoint
        self.key, self.parallel, self.retries, self.seconds = key, parallel, retries, seconds
        self.options = dict(options or {})
        self._tokenizer: Any = None
        self._version = 0

    def sync(self, policy: Policy, version: int) -> None:
        """Take the tokenizer of ``policy``; its weights are not asked."""
        self._tokenizer, self._version = policy.tokenizer, version

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Ask for all responses.

        Raises:
            RuntimeError: the server refuses, or does not answer after all retries; names the address and what it said.
        """
        if not requests:
            return []
        with ThreadPoolExecutor(min(self.parallel, len(requests))) as threads:
            return list(threads.map(self._complete, requests))

    def end(self, session: str) -> None:
        """Nothing is kept."""

    def _complete(self, request: Request) -> Completion:
        sampling = request.sampling
        prompt = self._tokenizer.decode(request.prompt_ids.tolist(), clean_up_tokenization_spaces=False)
        ends = {self._tokenizer.decode([token]): token for token in sampling.stop_ids}
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": sorted(ends)[:4],  # more are not allowed
            "seed": request.seed % 2**31,
            **self.options,
        }
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        answer = self._ask(body)
        ids = self._tokenizer.encode(answer.text, add_special_tokens=False)[: sampling.max_new_tokens]
        if answer.stopped and ends and (not ids or ids[-1] not in sampling.stop_ids):
            ids.append(ends[_left_out(answer.text, sorted(ends))])
        unknown = np.full(len(ids), np.nan, np.float32)
        return Completion(
            ids=np.asarray(ids, np.int32),
            logps=unknown,
            entropies=unknown,
            finish="stop" if answer.stopped else "length",
            weight_version=self._version,
        )

    def _ask(self, body: dict[str, Any]) -> _Answer:
        path = "chat/completions" if self.endpoint == "chat" else "completions"
        address = f"{self.address}/{path}"
        key = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return persist(
                lambda: _read(ask(address, body, seconds=self.seconds, headers=headers)), self.retries + 1, pause=0.5
            )
        except (NoAnswerError, StatusError) as error:
            raise RuntimeError(f"no answer from {address} for model {self.model!r}: {error}") from error


def _left_out(text: str, ends: Sequence[str]) -> str:
    """What the server stopped at, which it does not send: the tag that closes what is open, or else the end of text."""
    for end in ends:
        if end.strip().startswith("</") and text.count(end.strip().replace("</", "<", 1)) > text.count(end.strip()):
            return end
    return next((end for end in ends if not end.strip().startswith("</")), ends[0])


def _read(reply: Any) -> _Answer:
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return _Answer(str(text or ""), choice.get("finish_reason") != "length")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoAnswerError(f"an answer without a choice: {error!r}") from error

"""A model behind an OpenAI-compatible address, to be evaluated on the same tasks as one's own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from typing_extensions import override

from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.utils.http import JSONClient, NoAnswerError, StatusError, bearer, retry
from spear_lightning.utils.ranges import Above0, NotNegative, Positive, in_range

if TYPE_CHECKING:
    from spear_lightning.policy.policy import Policy


@in_range
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
        parallel: concurrent requests.
        retries: of a request that failed temporarily (connection, time-out, status 429 or 5xx), with pauses that
            double.
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
        parallel: Positive = 16,
        retries: NotNegative = 4,
        seconds: Above0 = 120.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"engine.address must begin with http:// or https://, not {address!r}")
        self.model, self.endpoint, self.parallel, self.retries = model, endpoint, parallel, retries
        self.address = f"{address.rstrip('/')}/{'chat/completions' if endpoint == 'chat' else 'completions'}"
        self.options = dict(options or {})
        self._client = JSONClient(seconds, bearer(key))
        self._tokenizer: Any = None
        self._version = 0

    @override
    def sync(self, policy: Policy, version: int) -> None:
        self._tokenizer, self._version = policy.tokenizer, version

    @override
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See the base class.

        Raises:
            RuntimeError: the server refuses, or does not answer after all retries; names the address and its answer.
        """
        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(self._complete, requests))

    @override
    def end(self, session: str) -> None:
        pass

    @override
    def close(self) -> None:
        self._client.close()

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
        try:
            text, stopped = retry(self.retries + 1, pause=0.5)(self._post, body)
        except (NoAnswerError, StatusError) as error:
            raise RuntimeError(f"no answer from {self.address} for model {self.model!r}: {error}") from error
        ids = self._tokenizer.encode(text, add_special_tokens=False)[: sampling.max_new_tokens]
        if stopped and ends and (not ids or ids[-1] not in sampling.stop_ids):
            ids.append(ends[_omitted_stop(text, sorted(ends))])
        unknown = np.full(len(ids), np.nan, np.float32)
        return Completion(np.asarray(ids, np.int32), unknown, unknown, "stop" if stopped else "length", self._version)

    def _post(self, body: dict[str, Any]) -> tuple[str, bool]:
        """The response's text, and whether it ended by itself."""
        answer = self._client.request(self.address, body)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            return str(text or ""), choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise NoAnswerError(f"an answer without a choice: {error!r}") from error


def _omitted_stop(text: str, ends: Sequence[str]) -> str:
    """The stop string, which the server does not send: the tag that closes what is open, or else the end of text."""
    for end in ends:
        if end.strip().startswith("</") and text.count(end.strip().replace("</", "<", 1)) > text.count(end.strip()):
            return end
    return next((end for end in ends if not end.strip().startswith("</")), ends[0])

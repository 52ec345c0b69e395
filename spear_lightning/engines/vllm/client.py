"""One vLLM server, called over HTTP: its API for generation and that for reinforcement learning."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from spear_lightning.engines.vllm.requests import LOGPROBS_MODE
from spear_lightning.utils.http import NoAnswerError, StatusError, ask

START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --enable-scale-out "
    f"--logprobs-mode {LOGPROBS_MODE} --worker-extension-cls spear_lightning.engines.vllm.worker.WeightReceiver"
)
"""How a server is started."""


class UnreachableError(ConnectionError):
    """A server does not answer, or answers that it cannot at present: it may be asked again."""


class RefusedError(RuntimeError):
    """A server refuses; asking again would not help.

    Attributes:
        status: of its answer; 0 where it answered what cannot be used.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Reply:
    """One generated response.

    Attributes:
        ids: drawn tokens.
        logps: of each token.
        finish: ``"stop"``, ``"length"`` or ``"abort"``.
        versions: labels of the weights that were at work.
    """

    ids: list[int]
    logps: list[float]
    finish: str
    versions: list[str]


class VLLMServer:
    """Client of one server; may be used by many threads.

    Args:
        address: of the server, without a path (``http://localhost:8000``).
        key: environment variable that holds the API key; unset or empty sends none.
        seconds: after which an unanswered request has failed.

    Attributes:
        lock: held by the thread that brings the server up to date.
    """

    def __init__(self, address: str, key: str, seconds: float) -> None:
        self.address = address.rstrip("/").removesuffix("/v1").rstrip("/")
        self.key, self.seconds = key, seconds
        self.lock = threading.Lock()

    def __str__(self) -> str:
        return f"the vLLM server {self.address}"

    # --- state ---------------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether it answers and its engine is alive."""
        try:
            self._ask("GET", "/health", seconds=min(5.0, self.seconds))
        except (UnreachableError, RefusedError):
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until it is healthy, at most so long; whether it is."""
        until, pause = time.monotonic() + seconds, 0.05
        while not self.healthy():
            if time.monotonic() + pause > until:
                return False
            time.sleep(pause)
            pause = min(2.0, 2 * pause)
        return True

    def model(self) -> tuple[str, int]:
        """Name of the served model, and its context window in tokens."""
        found = self._ask("GET", "/v1/models")["data"][0]
        return str(found["id"]), int(found["max_model_len"])

    def tokenize(self, text: str) -> list[int] | None:
        """Ids of a text by the server's tokenizer; ``None`` if it has none."""
        try:
            found = self._ask("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
        except RefusedError:
            return None
        return [int(token) for token in found["tokens"]]

    def describe(self) -> list[dict[str, Any]]:
        """What each of its workers is; see :meth:`~spear_lightning.engines.vllm.worker.WeightReceiver`.

        Raises:
            RefusedError: it was started without the worker extension.
        """
        try:
            found: list[dict[str, Any]] = self.rpc("spear_describe")
        except RefusedError as error:
            if error.status != 500:
                raise
            raise RefusedError(f"{self} cannot receive weights: start it with\n  {START}\n({error})") from error
        return found

    # --- weights -------------------------------------------------------------------------------------------------

    def rpc(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Call a method of all workers; their answers."""
        body = {"method": method, "args": list(arguments)}
        return self._development("POST", "/collective_rpc", body, seconds)["results"]

    def load(self, method: str, *arguments: Any, seconds: float | None = None) -> None:
        """Call a method of all workers that tells its failure.

        Raises:
            RefusedError: a worker failed.
        """
        for answer in self.rpc(method, *arguments, seconds=seconds):
            if answer["failure"]:
                raise RefusedError(f"{self} could not take the weights: {answer['failure']}")

    def version(self) -> str:
        """Label of its weights."""
        return str(self._development("GET", "/weight_info")["weight_version"])

    def pause(self) -> None:
        """Abort what is being generated, and begin nothing."""
        self._development("POST", "/pause?mode=abort", {})

    def resume(self) -> None:
        """Generate again."""
        self._development("POST", "/resume", {})

    def finish_sync(self, label: str) -> None:
        """Drop all keys and values that older weights have made, and name the new weights.

        Raises:
            UnreachableError: it keeps blocks of its cache, although nothing is being generated.
        """
        for _ in range(20):
            if self._development("POST", "/reset_prefix_cache", {})["success"]:
                break
            time.sleep(0.05)
        else:
            raise UnreachableError(f"{self} does not drop its prefix cache")
        self._development("POST", "/update_weight_version", {"new_version": label})

    def sleep(self) -> None:
        """Free the memory of weights and cache."""
        self._development("POST", "/sleep?level=2", {})

    def wake(self, part: str) -> None:
        """Take back the memory of ``"weights"`` or of the ``"kv_cache"``."""
        self._development("POST", f"/wake_up?tags={part}", {})

    # --- generation ----------------------------------------------------------------------------------------------

    def generate(self, prompt: list[int], sampling: dict[str, Any]) -> Reply:
        """Token ids in, token ids out.

        Raises:
            UnreachableError: no answer, or not one that can be read.
            RefusedError: the request is not one it would answer.
        """
        body = {"token_ids": prompt, "sampling_params": sampling}
        try:
            found = self._development("POST", "/inference/v1/generate", body)
        except RefusedError as error:
            if error.status == 500:  # what a server says whose engine has died, until it is gone
                raise UnreachableError(str(error)) from error
            raise
        try:
            choice = found["choices"][0]
            ids, finish = [int(token) for token in choice["token_ids"] or ()], str(choice["finish_reason"])
            logps = [float(entry["logprob"]) for entry in (choice["logprobs"] or {}).get("content") or ()]
            versions = choice.get("weight_versions")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UnreachableError(f"{self} gave an answer that cannot be read: {error!r}") from error
        if finish == "abort":
            return Reply([], [], finish, [])
        if versions is None:
            raise RefusedError(f"{self} does not tell the version of its weights: it needs vLLM 0.32 or newer")
        if len(ids) != len(logps):
            raise RefusedError(f"{self} sent {len(ids)} tokens with {len(logps)} log-probabilities")
        return Reply(ids, logps, finish, [str(span["version"]) for span in versions])

    # --- HTTP ----------------------------------------------------------------------------------------------------

    def _development(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None
    ) -> Any:
        try:
            return self._ask(method, path, body, seconds)
        except RefusedError as error:
            if error.status in (403, 404):
                raise RefusedError(
                    f"{self} has no {path.partition('?')[0]}: it is older than vLLM 0.32, or was started without "
                    f"VLLM_SERVER_DEV_MODE or --enable-scale-out. Start it with\n  {START}\n({error})"
                ) from error
            raise

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        key = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return ask(f"{self.address}{path}", body, method=method, headers=headers, seconds=seconds or self.seconds)
        except StatusError as error:
            said = f"{self} answered {path} with {error}"
            if error.status in (429, 502, 503, 504):
                raise UnreachableError(said) from error
            raise RefusedError(said, error.status) from error
        except NoAnswerError as error:
            raise UnreachableError(f"{self} did not answer {path}: {error}") from error

"""Client of one vLLM server: its API for generation and that for reinforcement learning."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

from spear_lightning.engines.vllm.requests import LOGPROBS_MODE
from spear_lightning.utils.http import JSONClient, NoAnswerError, StatusError, bearer

START = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL --enable-scale-out "
    f"--logprobs-mode {LOGPROBS_MODE} --worker-extension-cls spear_lightning.engines.vllm.worker.WeightReceiver"
)
"""How a server is started."""


class UnreachableError(NoAnswerError):
    """A server does not answer, or cannot at present: it may be asked again."""


class RefusedError(RuntimeError):
    """A server refuses; asking again would not help.

    Attributes:
        status: of its answer; 0 where the answer cannot be used.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Reply(NamedTuple):
    """One generated response.

    Attributes:
        ids: drawn tokens.
        logps: of each token.
        versions: labels of the weights that generated it.
    """

    ids: list[int]
    logps: list[float]
    versions: list[str]


class VLLMServer:
    """Client of one server; may be used by many threads.

    Args:
        address: of the server, without a path (``http://localhost:8000``).
        seconds: after which an unanswered request has failed.

    Attributes:
        lock: held by the thread that sends the server weights.
    """

    def __init__(self, address: str, seconds: float) -> None:
        self.address = address.rstrip("/").removesuffix("/v1").rstrip("/")
        self.lock = threading.Lock()
        self._client, self._seconds = JSONClient(seconds, bearer("VLLM_API_KEY")), seconds

    def __str__(self) -> str:
        return f"the vLLM server {self.address}"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # --- state ---------------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether it answers and its engine is alive."""
        try:
            self._request("/health", seconds=min(5.0, self._seconds))
        except (UnreachableError, RefusedError):
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds`` until it is healthy; whether it is."""
        until, pause = time.monotonic() + seconds, 0.05
        while not self.healthy():
            if time.monotonic() + pause > until:
                return False
            time.sleep(pause)
            pause = min(2.0, 2 * pause)
        return True

    def context_window(self) -> int:
        """The served model's context window in tokens."""
        return int(self._request("/v1/models")["data"][0]["max_model_len"])

    def tokenize(self, text: str) -> list[int] | None:
        """Encode a text with the server's tokenizer; ``None`` if it has none."""
        try:
            found = self._request("/tokenize", {"prompt": text, "add_special_tokens": False})
        except RefusedError:
            return None
        return [int(token) for token in found["tokens"]]

    def describe(self) -> list[dict[str, Any]]:
        """Its workers; see :meth:`~spear_lightning.engines.vllm.worker.WeightReceiver.spear_describe`.

        Raises:
            RefusedError: it was started without the worker extension.
        """
        try:
            found: list[dict[str, Any]] = self._rpc("spear_describe")
        except RefusedError as error:
            if error.status != 500:
                raise
            raise RefusedError(f"{self} cannot receive weights: start it with\n  {START}\n({error})") from error
        return found

    # --- weights -------------------------------------------------------------------------------------------------

    def load(self, method: str, *arguments: Any, seconds: float) -> None:
        """Call a method of all workers that returns what failed, or nothing.

        Raises:
            RefusedError: a worker failed.
        """
        if failure := next(filter(None, self._rpc(method, *arguments, seconds=seconds)), None):
            raise RefusedError(f"{self} could not take the weights: {failure}")

    def version(self) -> str:
        """Label of its weights."""
        return str(self._request("/weight_info")["weight_version"])

    def pause(self) -> None:
        """Abort running requests, and start none until :meth:`resume`."""
        self._request("/pause?mode=abort", {})

    def resume(self) -> None:
        """Start requests again."""
        self._request("/resume", {})

    def finish_sync(self, label: str) -> None:
        """Drop the prefix cache, which older weights have filled, and name the new weights.

        Raises:
            UnreachableError: it keeps blocks of its cache, although nothing is being generated.
        """
        for _ in range(20):
            if self._request("/reset_prefix_cache", {})["success"]:
                break
            time.sleep(0.05)
        else:
            raise UnreachableError(f"{self} does not drop its prefix cache")
        self._request("/update_weight_version", {"new_version": label})

    def sleep(self) -> None:
        """Free the memory of weights and cache."""
        self._request("/sleep?level=2", {})

    def wake(self, part: str) -> None:
        """Allocate the memory of ``"weights"`` or of the ``"kv_cache"`` again."""
        self._request(f"/wake_up?tags={part}", {})

    # --- generation ----------------------------------------------------------------------------------------------

    def generate(self, prompt: list[int], sampling: dict[str, Any]) -> Reply:
        """Token ids in, token ids out.

        Raises:
            UnreachableError: no answer, or not one that can be read, or the server was paused meanwhile.
            RefusedError: the request is not one it would answer.
        """
        body = {"token_ids": prompt, "sampling_params": sampling}
        try:
            found = self._request("/inference/v1/generate", body)
        except RefusedError as error:
            if error.status == 500:  # what a server says whose engine has died, until it is gone
                raise UnreachableError(str(error)) from error
            raise
        try:
            choice = found["choices"][0]
            if choice["finish_reason"] == "abort":  # by a pause, that is by someone who sends weights
                raise UnreachableError(f"{self} was paused")
            ids = [int(token) for token in choice["token_ids"] or ()]
            logps = [float(entry["logprob"]) for entry in (choice["logprobs"] or {}).get("content") or ()]
            versions = choice.get("weight_versions")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UnreachableError(f"{self} gave an answer that cannot be read: {error!r}") from error
        if versions is None:
            raise RefusedError(f"{self} does not tell the version of its weights: it needs vLLM 0.32 or newer")
        if len(ids) != len(logps):
            raise RefusedError(f"{self} sent {len(ids)} tokens with {len(logps)} log-probabilities")
        return Reply(ids, logps, [str(span["version"]) for span in versions])

    # --- HTTP ----------------------------------------------------------------------------------------------------

    def _rpc(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Call a method of all workers; their answers."""
        return self._request("/collective_rpc", {"method": method, "args": list(arguments)}, seconds)["results"]

    def _request(self, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        try:
            return self._client.request(f"{self.address}{path}", body, seconds)
        except NoAnswerError as error:
            raise UnreachableError(f"{self} did not answer {path}: {error}") from error
        except StatusError as error:
            message = f"{self} answered {path} with {error}"
            if error.status in (429, 502, 503, 504):
                raise UnreachableError(message) from error
            if error.status in (403, 404):
                message = (
                    f"{self} has no {path.partition('?')[0]}: it is older than vLLM 0.32, or was started without "
                    f"VLLM_SERVER_DEV_MODE or --enable-scale-out. Start it with\n  {START}\n({message})"
                )
            raise RefusedError(message, error.status) from error

"""The interface of engines: token ids in, token ids and behaviour log-probabilities out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Lt
from typing_extensions import override

from spear_lightning.utils.ranges import NotNegative, Positive, Share, in_range

if TYPE_CHECKING:
    import torch

    from spear_lightning.policy.policy import Policy


@in_range
@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: length limit of one response, the stop token included.
        temperature: of the softmax; 0 takes the most likely token.
        stop_ids: token ids that end a response; the stop token belongs to the response.
        top_p: nucleus; 1 keeps everything. Only for evaluation: in training it would bias the importance ratio.
        top_k: number of tokens kept; 0 keeps everything. Only for evaluation.

    Raises:
        ValueError: a number is out of range.
    """

    max_new_tokens: Positive
    temperature: Annotated[float, Ge(0), Lt(math.inf)] = 1.0
    stop_ids: tuple[int, ...] = ()
    top_p: Share = 1.0
    top_k: NotNegative = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One response to generate.

    Attributes:
        session: names the episode; an engine may keep its key-value cache between the requests of one session.
        prompt_ids: the *full* prompt, int32 of shape ``(prompt tokens,)``.
        sampling: how to draw.
        seed: of the counter-based stream (:func:`~spear_lightning.utils.randomness.uniforms`) that this response is
            drawn from: one uniform number per token, turned into a token by the inverse of the cumulative distribution.
    """

    session: str
    prompt_ids: npt.NDArray[np.int32]
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated response.

    Attributes:
        ids: generated token ids, int32 ``(tokens,)``; ends with the stop token when ``finish == "stop"``.
        logps: log-probability of each token under the untruncated policy at the sampling temperature (at temperature
            1 when it is 0), float32 ``(tokens,)``.
        entropies: entropy of that distribution at each token in nats, float32 ``(tokens,)``; NaN where unknown.
        finish: ``"stop"`` (a stop token was drawn) or ``"length"`` (limit reached, or the prompt left no room: then
            ``ids`` may be empty).
        weight_version: of the weights that generated it.
    """

    ids: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    entropies: npt.NDArray[np.float32]
    finish: Literal["stop", "length"]
    weight_version: int


class CompletionStream(ABC):
    """Requests that are handed to an engine while it answers others; made by :meth:`RolloutEngine.stream`.

    How far the engine is with one request when another comes is a question of time, so batches differ from run to run.
    A completion does not depend on its batch but for rounding.
    """

    @property
    @abstractmethod
    def unfinished(self) -> int:
        """Number of requests whose completion has not been given out."""

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Hand in requests. A session may have one request at a time."""

    @abstractmethod
    def poll(self) -> dict[str, Completion]:
        """Generate for a moment; the completions that are finished since, by session, perhaps none."""

    @abstractmethod
    def close(self) -> None:
        """Drop what is unfinished."""

    def finish(self) -> dict[str, Completion]:
        """Generate until nothing is unfinished; the completions by session."""
        completions: dict[str, Completion] = {}
        while self.unfinished:
            completions |= self.poll()
        return completions


class BatchStream(CompletionStream):
    """The stream of an engine that answers whole batches: each poll is a call with all that has come in since.

    Args:
        engine: that answers.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._requests: dict[str, Request] = {}

    @property
    @override
    def unfinished(self) -> int:
        return len(self._requests)

    @override
    def submit(self, requests: Sequence[Request]) -> None:
        self._requests |= {request.session: request for request in requests}

    @override
    def poll(self) -> dict[str, Completion]:
        requests, self._requests = self._requests, {}
        return dict(zip(requests, self._engine.generate(list(requests.values())), strict=True)) if requests else {}

    @override
    def close(self) -> None:
        self._requests = {}


class RolloutEngine(ABC):
    """Generates responses with the current policy.

    A base class and not a protocol, so that a configuration can name an engine by its class name alone.

    Attributes:
        trains: whether it generates with the policy's weights and gives log-probabilities, as training needs.
    """

    trains: ClassVar[bool] = True

    def prepare(self, policy: Policy, device: torch.device) -> None:  # noqa: B027 - an engine may need nothing
        """Check that its requirements are met, before anything else of a run is started.

        Args:
            policy: that it will be synced with; its weights need not be whole yet.
            device: that the policy will be on.

        Raises:
            ValueError: something is missing, or does not fit the policy; names it and the fix.
            OSError: something cannot be reached.
        """

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order. Sessions must be distinct within a call."""

    @abstractmethod
    def sync(self, policy: Policy, version: int) -> None:
        """Take over the weights of ``policy`` and drop every cache made with older ones."""

    @abstractmethod
    def end(self, session: str) -> None:
        """The session will not be continued: free what is kept for it. Unknown sessions are ignored."""

    def stream(self) -> CompletionStream:
        """Requests that come while others are being answered; by default batch by batch, by :meth:`generate`.

        One stream at a time, and no call of :meth:`generate` while it has unfinished requests.
        """
        return BatchStream(self)

    def sleep(self) -> None:  # noqa: B027 - an engine may have nothing to free
        """Free what generation needs until :meth:`wake` (between rollout phases)."""

    def wake(self) -> None:  # noqa: B027
        """Make ready to generate again."""

    def close(self) -> None:  # noqa: B027
        """Free everything; the engine is not used afterwards."""

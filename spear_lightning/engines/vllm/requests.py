"""Conversion to vLLM's sampling parameters and from its responses, for servers and for the engine in the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from spear_lightning.engines.base import Completion, Request
from spear_lightning.utils.http import NoAnswerError

LOGPROBS_MODE = "processed_logprobs"
"""vLLM's name for log-probabilities at the sampling temperature (its default is those at temperature 1)."""

LEAST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one."""


class StaleWeightsError(NoAnswerError):
    """Other weights than the current ones have generated a completion: it may be asked for again."""


def sampling_fields(requests: Sequence[Request], longest: int) -> list[dict[str, Any] | None]:
    """Convert to ``SamplingParams``, as keyword arguments or JSON.

    Args:
        requests: to convert.
        longest: sequence, in tokens.

    Returns:
        ``None`` for requests whose prompts leave no room for a token.

    Raises:
        ValueError: a temperature is one that vLLM would change.
    """
    fields: list[dict[str, Any] | None] = []
    for request in requests:
        sampling = request.sampling
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"vLLM cannot sample at temperature {sampling.temperature}: use 0 or at least {LEAST_TEMPERATURE}"
            )
        limit = min(sampling.max_new_tokens, longest - len(request.prompt_ids))
        values = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": request.seed,
            "max_tokens": limit,
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # stop_token_ids alone end a response
            "logprobs": 0,  # that of the drawn token alone
            "detokenize": False,
        }
        fields.append(values if limit > 0 else None)
    return fields


def completion_of(
    request: Request, ids: Sequence[int], logps: Sequence[float], versions: Sequence[str], label: str, version: int
) -> Completion:
    """Convert a response of vLLM, if the current weights alone have generated it.

    Args:
        request: that it answers.
        ids: drawn tokens.
        logps: of each token, at the sampling temperature and after truncation.
        versions: labels of the weights that generated it.
        label: of the current weights.
        version: number of the current weights.

    Returns:
        The completion. Entropies are NaN: vLLM does not tell them. So are log-probabilities where ``top_p`` or
        ``top_k`` truncates: vLLM tells those of the truncated distribution.

    Raises:
        StaleWeightsError: other weights have generated some of it.
    """
    found = sorted(set(versions))
    if found != [label]:
        raise StaleWeightsError(f"a completion by weights {', '.join(found) or 'without a version'} instead of {label}")
    tokens = np.asarray(ids, np.int32)
    unknown = np.full(len(tokens), np.nan, np.float32)
    truncated = request.sampling.top_p < 1 or request.sampling.top_k > 0
    stopped = len(tokens) > 0 and int(tokens[-1]) in request.sampling.stop_ids
    finish: Literal["stop", "length"] = "stop" if stopped else "length"
    return Completion(tokens, unknown if truncated else np.asarray(logps, np.float32), unknown, finish, version)


def empty_completion(version: int) -> Completion:
    """The completion of a prompt that leaves no room for a token: the episode ends as overlong."""
    nothing = np.zeros(0, np.float32)
    return Completion(np.zeros(0, np.int32), nothing, nothing, "length", version)

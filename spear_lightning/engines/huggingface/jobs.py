"""State of a request that is being answered."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spear_lightning.engines.base import Completion, Request
from spear_lightning.engines.huggingface.cache_rows import Ids, Session


@dataclass(slots=True, eq=False)
class Job:
    """A request that is being answered.

    Attributes:
        request: to answer.
        limit: of new tokens; below 1 where the prompt leaves no room.
        session: its row of the cache.
        known: tokens of the prompt that stand in the row.
        tokens: drawn so far, with their ``logps`` and ``entropies``.
        stopped: a stop token was drawn.
    """

    request: Request
    limit: int
    session: Session = field(default_factory=lambda: Session(""))
    known: int = 0
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def prompt(self) -> Ids:
        """The full prompt."""
        return self.request.prompt_ids

    @property
    def length(self) -> int:
        """Tokens so far, prompt and response."""
        return len(self.prompt) + len(self.tokens)

    @property
    def columns(self) -> int:
        """Most columns that it needs: all tokens but the last, which is not fed, and one for other prompts' padding."""
        return len(self.prompt) + self.limit

    @property
    def done(self) -> bool:
        """Nothing more is drawn."""
        return self.stopped or len(self.tokens) >= self.limit

    def append(self, token: int, logp: float, entropy: float) -> None:
        """Append a token."""
        self.tokens.append(token)
        self.logps.append(logp)
        self.entropies.append(entropy)
        self.stopped = token in self.request.sampling.stop_ids

    def completion(self, version: int) -> Completion:
        """The response, generated with weights of that version."""
        return Completion(
            ids=np.array(self.tokens, np.int32),
            logps=np.array(self.logps, np.float32),
            entropies=np.array(self.entropies, np.float32),
            finish="stop" if self.stopped else "length",
            weight_version=version,
        )

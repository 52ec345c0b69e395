"""Rollouts in the training process, on the very weights that are trained.

What makes it fast on small models and exact on all:

- Keys and values are kept from turn to turn of an episode; only what is new in a prompt is fed. Each episode has a row
  of the cache and every row its own length (:mod:`spear_lightning.engines.key_values`).
- Episodes that start from the same prompt (a group) have it computed once.
- Prompts of very different length are fed in groups of similar length.
- Rows that decode are neighbours, so their keys and values are a view; when half of them are done, the others move
  together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.engines.batches import check_requests, common_prefix, similar_lengths
from spear_lightning.engines.generation_mode import generation_mode
from spear_lightning.engines.key_values import KeyValueRows
from spear_lightning.engines.masks import AttentionMasks, masks_of
from spear_lightning.engines.sampling import Draw, TokenSampler
from spear_lightning.policy import Policy

_Ids = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Session:
    """An episode's row of the cache and the token ids whose keys and values stand in it."""

    row: int
    ids: _Ids = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(slots=True)
class _Job:
    """A request that is being answered."""

    number: int  # in the call
    request: Request
    limit: int  # of new tokens
    session: _Session = field(default_factory=lambda: _Session(-1))
    known: int = 0  # tokens of the prompt that stand in the cache
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def prompt(self) -> _Ids:
        return self.request.prompt_ids

    @property
    def length(self) -> int:
        """Tokens so far, prompt and response."""
        return len(self.prompt) + len(self.tokens)

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.limit


class HuggingFaceEngine(RolloutEngine):
    """Generates with the policy's own Hugging Face model, in the training process.

    Behaviour log-probabilities equal :meth:`spear_lightning.policy.Policy.evaluate` to rounding, so no correction is
    needed. What is drawn for a request depends on its prompt, sampling and seed, not on the batch.

    The engine holds a reference to the policy, not a copy: after every change of the weights :meth:`sync` must be
    called, and generating without is refused. For ZeRO-3, whose weights are partitioned, give it a gathered replica.

    Args:
        keep_cache: keep keys and values between the turns of an episode: much faster, at the price of the memory for
            all episodes that are being played. Without, every prompt is computed anew.
        max_batch: requests decoded together; larger calls are split.
        max_length: longest sequence, prompt and response; by default what the model allows.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, keep_cache: bool = True, max_batch: int = 256, max_length: int | None = None) -> None:
        if max_batch < 1:
            raise ValueError(f"engine.max_batch must be at least 1, not {max_batch}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"engine.max_length must be at least 2 (a prompt and a token), not {max_length}")
        self.keep_cache = keep_cache
        self.max_batch = max_batch
        self.max_length = max_length
        self._policy: Policy | None = None
        self._version = 0
        self._weights: tuple[nn.Parameter, ...] = ()
        self._weights_state = 0
        self._masks: AttentionMasks | None = None
        self._drop_caches()

    # --- the protocol --------------------------------------------------------------------------------------------

    def sync(self, policy: Policy, version: int) -> None:
        """Generate with ``policy`` as it is now; every cache made with other weights is dropped.

        Args:
            policy: that is trained; referred to, not copied.
            version: of its weights, handed on with every completion.

        Raises:
            ValueError: the model's architecture keeps no ordinary keys and values (recurrent models, ALiBi).
        """
        if policy is not self._policy:
            self._masks = masks_of(policy)
        self._policy, self._version = policy, version
        self._weights = tuple(policy.parameters())
        self._weights_state = self._state_of_weights()
        self._drop_caches()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Args:
            requests: with distinct sessions. A prompt that leaves no room for a token gets an empty completion that
                finishes by ``"length"``.

        Raises:
            RuntimeError: before the first :meth:`sync`, or when the weights have changed since.
            ValueError: a request is malformed (empty prompt, unknown token id, doubled session, sampling out of range).
        """
        if self._policy is None:
            raise RuntimeError("HuggingFaceEngine.generate was called before sync: it has no policy yet")
        if self._state_of_weights() != self._weights_state:
            raise RuntimeError(
                "the policy's weights have changed since HuggingFaceEngine.sync: call it after every update"
            )
        longest = self._longest()
        check_requests(requests, self._policy.causal_lm.get_input_embeddings().num_embeddings)
        jobs = []
        for number, request in enumerate(requests):
            limit = min(request.sampling.max_new_tokens, longest - len(request.prompt_ids))
            if limit > 0:
                jobs.append(_Job(number, request, limit))
        nothing = np.zeros(0, np.float32)
        completions = [Completion(np.zeros(0, np.int32), nothing, nothing, "length", self._version) for _ in requests]
        with generation_mode(self._policy):
            first = 0
            for start in range(0, len(jobs), self.max_batch):
                batch = jobs[start : start + self.max_batch]
                for job, completion in zip(batch, self._answer(batch, first), strict=True):
                    completions[job.number] = completion
                if self.keep_cache:
                    first += len(batch)
                else:
                    self._forget_sessions()
        return completions

    def end(self, session: str) -> None:
        """Free the session's row."""
        if (ended := self._sessions.pop(session, None)) is not None:
            self._rows[ended.row] = None

    def sleep(self) -> None:
        """Free all caches."""
        self._drop_caches()

    def wake(self) -> None:
        """Nothing to be made ready."""

    def close(self) -> None:
        """Free all caches and let go of the policy."""
        self._drop_caches()
        self._policy, self._weights, self._masks = None, (), None

    # --- one batch -----------------------------------------------------------------------------------------------

    def _answer(self, jobs: list[_Job], first: int) -> list[Completion]:
        """Answer a batch in the rows from ``first`` on; completions in the order of ``jobs``."""
        assert self._policy is not None
        leaders, followers = self._match(jobs)
        order = self._seat(jobs, range(first, first + len(jobs)))
        device = self._weights[0].device
        sampler = TokenSampler([job.request for job in jobs], [job.limit for job in jobs], device)
        index = {job.number: number for number, job in enumerate(jobs)}

        leaders.sort(key=lambda job: job.session.row)  # neighbours are fed as a view
        logits = self._prefill(leaders)
        lines = {job.number: line for line, job in enumerate(leaders)}
        if followers:
            sources = [leader.session.row for _, leader in followers]
            targets = [follower.session.row for follower, _ in followers]
            self._cache.copy(sources, targets, max(len(leader.prompt) for _, leader in followers))
            lines |= {follower.number: lines[leader.number] for follower, leader in followers}
        logits = logits[[lines[job.number] for job in order]]

        numbers = torch.tensor([index[job.number] for job in order], device=device)
        steps: list[tuple[Tensor, Draw]] = []
        active = order
        while True:
            draw = sampler.draw(logits, numbers, len(steps))
            steps.append((numbers, draw))
            for job, token in zip(active, draw.tokens.tolist(), strict=True):
                if not job.done:
                    job.tokens.append(token)
                    job.stopped = token in job.request.sampling.stop_ids
            going = sum(not job.done for job in active)
            if not going:
                break
            tokens = draw.tokens
            if 2 * going <= len(active):
                active, kept = self._gather_active(active, first, going)
                chosen = torch.tensor(kept, device=device)
                tokens, numbers = tokens[chosen], numbers[chosen]
            logits = self._decode(active, first, tokens)

        for job in jobs:
            # The last token has been drawn, but not fed: its keys and values are not there.
            job.session.ids = np.concatenate([job.prompt, np.array(job.tokens[:-1], np.int32)])
        return self._completions(jobs, steps)

    def _match(self, jobs: list[_Job]) -> tuple[list[_Job], list[tuple[_Job, _Job]]]:
        """Find what is known of each prompt.

        Returns:
            The jobs whose prompts must be computed, and pairs ``(follower, leader)`` of those that share a leader's
            prompt.
        """
        leaders: list[_Job] = []
        followers: list[tuple[_Job, _Job]] = []
        fresh: dict[bytes, _Job] = {}
        for job in jobs:
            session = self._sessions.get(job.request.session)
            if session is not None:
                job.session = session
                # The last token is always fed: its logits are what generation starts from.
                job.known = min(common_prefix(session.ids, job.prompt), len(job.prompt) - 1)
                session.ids = session.ids[: job.known]
            if job.known == 0:
                leader = fresh.setdefault(np.ascontiguousarray(job.prompt, np.int32).tobytes(), job)
                if leader is not job:
                    followers.append((job, leader))
                    continue
            leaders.append(job)
        return leaders, followers

    def _prefill(self, jobs: list[_Job]) -> Tensor:
        """Feed what is new of the prompts; the logits after each, ``(jobs, vocabulary)``."""
        assert self._policy is not None
        device = self._weights[0].device
        new = [len(job.prompt) - job.known for job in jobs]
        logits: Tensor | None = None
        for group in similar_lengths(new):
            chosen = [jobs[number] for number in group]
            tokens = max(new[number] for number in group)
            ids = np.zeros((len(group), tokens), np.int64)
            for line, (job, number) in enumerate(zip(chosen, group, strict=True)):
                ids[line, : new[number]] = job.prompt[job.known :]
            starts = torch.tensor([job.known for job in chosen], device=device)
            lasts = torch.tensor([new[number] - 1 for number in group], device=device)
            rows = [job.session.row for job in chosen]
            place: slice | Tensor = torch.tensor(rows, device=device)
            if rows == list(range(rows[0], rows[0] + len(rows))):
                place = slice(rows[0], rows[0] + len(rows))
            columns = starts[:, None] + torch.arange(tokens, device=device)
            width = max(job.known for job in chosen) + tokens
            # What pads a row stands beyond its length; its position must still be one the model knows.
            positions = torch.minimum(columns, (starts + lasts)[:, None])
            part = self._forward(torch.from_numpy(ids).to(device), lasts, place, columns, positions, width)
            if logits is None:
                logits = part.new_empty(len(jobs), part.shape[-1])
            logits[group] = part
        assert logits is not None
        return logits

    def _decode(self, jobs: list[_Job], first: int, tokens: Tensor) -> Tensor:
        """Feed one token to each of the neighbouring rows from ``first`` on; the logits after it."""
        # Rows that are done stay where they are: what is fed to them stands beyond what they keep.
        lengths = [job.length - 1 for job in jobs]
        columns = torch.tensor(lengths, device=tokens.device)[:, None]
        lasts = torch.zeros(len(jobs), dtype=torch.long, device=tokens.device)
        rows = slice(first, first + len(jobs))
        return self._forward(tokens[:, None], lasts, rows, columns, columns, max(lengths) + 1)

    def _forward(
        self,
        ids: Tensor,
        lasts: Tensor,
        rows: slice | Tensor,
        columns: Tensor,
        positions: Tensor,
        width: int,
    ) -> Tensor:
        assert self._policy is not None
        assert self._masks is not None
        self._cache.reserve(len(self._rows), width)
        self._cache.open(rows, columns, width)
        return self._policy.next_token_logits(
            ids,
            lasts,
            attention_mask=self._masks(columns, width, self._policy.causal_lm.dtype),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )

    def _completions(self, jobs: list[_Job], steps: list[tuple[Tensor, Draw]]) -> list[Completion]:
        logps, entropies = np.zeros((2, len(jobs), len(steps)), np.float32)
        for step, (numbers, draw) in enumerate(steps):
            chosen = numbers.cpu().numpy()
            logps[chosen, step], entropies[chosen, step] = draw.logps.cpu().numpy(), draw.entropies.cpu().numpy()
        return [
            Completion(
                ids=np.array(job.tokens, np.int32),
                logps=logps[number, : len(job.tokens)].copy(),
                entropies=entropies[number, : len(job.tokens)].copy(),
                finish="stop" if job.stopped else "length",
                weight_version=self._version,
            )
            for number, job in enumerate(jobs)
        ]

    # --- rows of the cache ---------------------------------------------------------------------------------------

    def _seat(self, jobs: list[_Job], batch: range) -> list[_Job]:
        """Give each job a row of the batch. Who has one there keeps it: moving keys and values is what costs.

        Returns:
            The jobs in the order of their rows.
        """
        while len(self._rows) < batch.stop:
            self._rows.append(None)
        taken = {job.session.row for job in jobs}
        coming = [job for job in jobs if job.session.row not in batch]
        for row, job in zip((row for row in batch if row not in taken), coming, strict=True):
            self._place(job, row, batch)
        return sorted(jobs, key=lambda job: job.session.row)

    def _place(self, job: _Job, row: int, batch: range) -> None:
        """Bring a job's session to a row of its batch; who stands there moves out of the way."""
        session, occupant = job.session, self._rows[row]
        if session.row >= 0:
            self._exchange([session.row], [row], max(len(session.ids), 0 if occupant is None else len(occupant.ids)))
            return
        if occupant is not None:
            free = (at for at, other in enumerate(self._rows) if other is None and at not in batch)
            target = next(free, len(self._rows))
            if target == len(self._rows):
                self._rows.append(None)
            self._exchange([row], [target], len(occupant.ids))
        session.row = row
        self._rows[row] = self._sessions[job.request.session] = session

    def _gather_active(self, jobs: list[_Job], first: int, going: int) -> tuple[list[_Job], list[int]]:
        """Bring the rows that still decode together at ``first``.

        Returns:
            Their jobs in the new order, and where each was among ``jobs``.
        """
        order = list(range(len(jobs)))
        holes = [number for number in range(going) if jobs[number].done]
        movers = [number for number in range(going, len(jobs)) if not jobs[number].done]
        width = max(job.length for job in jobs)
        self._exchange([first + hole for hole in holes], [first + mover for mover in movers], width)
        for hole, mover in zip(holes, movers, strict=True):
            order[hole], order[mover] = mover, hole
        kept = order[:going]
        return [jobs[number] for number in kept], kept

    def _exchange(self, ones: list[int], others: list[int], width: int) -> None:
        """Exchange the first ``width`` columns, and the owners, of rows pairwise."""
        self._cache.reserve(len(self._rows), 0)
        self._cache.swap(ones, others, width)
        for one, other in zip(ones, others, strict=True):
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]
        for row in (*ones, *others):
            if (session := self._rows[row]) is not None:
                session.row = row

    def _forget_sessions(self) -> None:
        self._sessions: dict[str, _Session] = {}
        self._rows: list[_Session | None] = []

    def _drop_caches(self) -> None:
        self._forget_sessions()
        self._cache = KeyValueRows()

    # --- limits and state ----------------------------------------------------------------------------------------

    def _longest(self) -> int:
        assert self._policy is not None
        positions = getattr(self._policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        limits = [limit for limit in (self.max_length, positions) if limit]
        return min(limits, default=2**31)

    def _state_of_weights(self) -> int:
        """A number that changes when a weight is written to (PyTorch counts writes)."""
        return sum(weight._version for weight in self._weights)

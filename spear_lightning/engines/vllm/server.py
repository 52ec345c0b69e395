"""Rollouts by vLLM servers, on GPUs or machines of their own."""

from __future__ import annotations

import contextlib
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from spear_lightning.distributed.collectives import gather, rank
from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.engines.batches import check_requests
from spear_lightning.engines.vllm.client import START, RefusedError, UnreachableError, VLLMServer
from spear_lightning.engines.vllm.requests import StaleWeightsError, completion_of, empty_completion, sampling_fields
from spear_lightning.engines.vllm.routing import StickySessions
from spear_lightning.engines.vllm.transport import Broadcast, SharedFolder, WeightTransport
from spear_lightning.policy.policy import Policy

_PROBE_TOKENS = 64


class VLLMServerEngine(RolloutEngine):
    """Has one or many vLLM servers generate, and brings each the policy's weights before every rollout phase.

    Sessions stay with their server, whose prefix cache knows them. Every completion tells the weights that made it, and
    one by others than the current ones is asked for again: a server that was restarted in the middle of a phase answers
    with the weights it was started with, gets the current ones, and only then goes on. A server that stays away hands
    its sessions over to the others; only when none is left does the run fail. Of several training ranks the first
    brings the weights, and all of them generate.

    Responses are drawn from the request's seed by the server's own random numbers: the same seed gives the same tokens
    on the same vLLM, and other ones than another engine.

    Args:
        addresses: of the servers (``http://localhost:8000``). Start them as ``docs/engines.md`` says.
        transport: of the weights; by default :class:`~spear_lightning.engines.vllm.transport.Broadcast` for a policy on
            a GPU and :class:`~spear_lightning.engines.vllm.transport.SharedFolder` otherwise.
        free_memory: have the servers free weights and cache between rollout phases (they were started with
            ``--enable-sleep-mode``): for servers that share their GPUs with the training.
        key: environment variable that holds the servers' API key; unset or empty sends none.
        parallel: requests under way at a time.
        retries: of a request that failed in a way that may pass.
        seconds: after which an unanswered request has failed.
        restart_seconds: a server that is away for longer is given up for this phase.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        addresses: list[str],
        transport: WeightTransport | None = None,
        free_memory: bool = False,
        key: str = "VLLM_API_KEY",
        parallel: int = 256,
        retries: int = 8,
        seconds: float = 600.0,
        restart_seconds: float = 180.0,
    ) -> None:
        if not addresses:
            raise ValueError("engine.addresses must name at least one vLLM server")
        for address in addresses:
            if not address.startswith(("http://", "https://")):
                raise ValueError(f"engine.addresses must begin with http:// or https://, not {address!r}")
        servers = [VLLMServer(address, key, seconds) for address in addresses]
        self._servers = {server.address: server for server in servers}
        if len(self._servers) < len(addresses):
            raise ValueError("engine.addresses names a server twice")
        for name, value, least in (("parallel", parallel, 1), ("retries", retries, 0)):
            if value < least:
                raise ValueError(f"engine.{name} must be at least {least}, not {value}")
        if seconds <= 0 or restart_seconds < 0:
            raise ValueError("engine.seconds must be above 0 and engine.restart_seconds not below")
        self.addresses, self.transport, self.free_memory = list(self._servers), transport, free_memory
        self.key, self.parallel, self.retries = key, parallel, retries
        self.seconds, self.restart_seconds = seconds, restart_seconds
        self._sessions = StickySessions(self.addresses)
        self._transport = transport
        self._policy: Policy | None = None
        self._version, self._label, self._run = 0, "", ""
        self._longest = 0

    # --- the protocol --------------------------------------------------------------------------------------------

    def prepare(self, policy: Policy, device: torch.device) -> None:
        """Look whether all servers are there, can take weights and serve the policy's model with its tokenizer.

        Raises:
            ConnectionError: one of them cannot be reached.
            ValueError: one of them has another model or tokenizer, or was started without what is needed.
        """
        for server in self._servers.values():
            if not server.wait(self.restart_seconds):
                raise ConnectionError(
                    f"{server} (data.engine.addresses) cannot be reached after {self.restart_seconds:g} s: start it "
                    f"with\n  {START}"
                )
        try:
            self._on_all_servers(lambda server: self._check_model(server, server.describe(), policy))
        except RefusedError as error:
            raise ValueError(str(error)) from error

    def sync(self, policy: Policy, version: int) -> None:
        """Bring all servers the weights of ``policy``. Every rank must call it.

        Servers that were given up are asked again.

        Raises:
            RuntimeError: a server has another model or tokenizer or cannot take the weights, or none can be reached.
        """
        self._policy, self._version = policy, version
        self._sessions.first = rank()
        failure = ""
        gather(None)  # no rank generates any more
        if rank() == 0:
            self._run = self._run or uuid.uuid4().hex[:12]
            self._label = f"{self._run}-{version}"
            try:
                self._on_all_servers(self._bring_up_to_date)
                self._longest = min(server.model()[1] for server in self._live())
            except (RuntimeError, ConnectionError, ValueError) as error:
                failure = str(error)
        told = gather((failure, self._run, self._label, self._longest, self._sessions.lost))
        failure, self._run, self._label, self._longest, lost = told[0]
        if failure:
            raise RuntimeError(failure)
        self._sessions.set_lost(lost)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Args:
            requests: with distinct sessions. A prompt that leaves no room for a token in the server's context window
                gets an empty completion that finishes by ``"length"``.

        Raises:
            RuntimeError: before the first :meth:`sync`; a server refuses a request, or none answers after all retries.
            ValueError: a request is malformed.
        """
        if self._policy is None:
            raise RuntimeError("VLLMServerEngine.generate was called before sync: the servers have no weights yet")
        check_requests(requests, self._policy.causal_lm.get_input_embeddings().num_embeddings)
        completions = [empty_completion(self._version) for _ in requests]
        fields: dict[int, dict[str, Any]] = {}
        for number, request in enumerate(requests):
            limit = min(request.sampling.max_new_tokens, self._longest - len(request.prompt_ids))
            if limit > 0:
                fields[number] = sampling_fields(request, limit)
                self._place(request.session)  # in the order of the requests, whatever thread comes first
        if not fields:
            return completions
        with ThreadPoolExecutor(min(self.parallel, len(fields))) as threads:
            answers = threads.map(lambda number: self._complete(requests[number], fields[number]), fields)
            for number, completion in zip(fields, answers, strict=True):
                completions[number] = completion
        return completions

    def end(self, session: str) -> None:
        """Forget where the session was answered; the server's cache forgets by itself."""
        self._sessions.end(session)

    def sleep(self) -> None:
        """Have the servers free their memory, if so configured. Every rank must call it."""
        if self.free_memory:
            self._from_first_rank(lambda server: server.sleep())

    def wake(self) -> None:
        """Have the servers take back the memory of their weights, which :meth:`sync` then brings."""
        if self.free_memory:
            self._from_first_rank(lambda server: server.wake("weights"))

    def close(self) -> None:
        """Leave the servers to themselves."""
        if self._transport is not None:
            self._transport.close()
        self._policy = None

    # --- one request ---------------------------------------------------------------------------------------------

    def _complete(self, request: Request, fields: dict[str, Any]) -> Completion:
        prompt = request.prompt_ids.tolist()
        failure: Exception | None = None
        for attempt in range(self.retries + 1):
            server = self._servers[self._place(request.session)]
            try:
                reply = server.generate(prompt, fields)
                if reply.finish != "abort":  # by a pause, that is by someone who brings weights
                    label, version = self._label, self._version
                    return completion_of(request, reply.ids, reply.logps, reply.versions, label, version)
            except (UnreachableError, StaleWeightsError) as error:
                failure = error
                self._recover(server)
            else:
                failure = StaleWeightsError(f"{server} was paused")
            time.sleep(min(5.0, 0.05 * 2**attempt) if attempt else 0.0)
        raise RuntimeError(
            f"session {request.session} has no completion after {self.retries + 1} attempts: {failure}"
        ) from failure

    def _place(self, session: str) -> str:
        try:
            return self._sessions.place(session)
        except LookupError as error:
            raise RuntimeError(
                f"none of the vLLM servers {', '.join(self.addresses)} (data.engine.addresses) can be reached: "
                f"start them with\n  {START}\nand resume the run"
            ) from error

    def _recover(self, server: VLLMServer) -> None:
        """Bring a server the current weights if it has not got them; give it up if it stays away."""
        with server.lock:
            if server.address in self._sessions.lost:
                return
            try:
                if server.healthy() and server.version() == self._label:
                    return
            except UnreachableError:
                pass
            if not self._try_to_bring(server):
                self._give_up(server)

    # --- weights -------------------------------------------------------------------------------------------------

    def _bring_up_to_date(self, server: VLLMServer) -> None:
        with server.lock:
            given_up = server.address in self._sessions.lost
            if self._try_to_bring(server, 0.0 if given_up else self.restart_seconds):
                self._sessions.find(server.address)
            elif not given_up:
                self._give_up(server)

    def _try_to_bring(self, server: VLLMServer, seconds: float | None = None) -> bool:
        """Whether the server is back within so many seconds and has the current weights now."""
        until = time.monotonic() + (self.restart_seconds if seconds is None else seconds)
        while server.wait(max(0.0, until - time.monotonic())):
            try:
                self._bring(server)
            except UnreachableError:  # it died on the way
                if time.monotonic() > until:
                    return False
                time.sleep(0.1)
                continue
            return True
        return False

    def _bring(self, server: VLLMServer) -> None:
        assert self._policy is not None
        workers = server.describe()
        if not server.version().startswith(self._run):  # not the server it was at the last sync
            self._check_model(server, workers, self._policy)
        if self._transport is None:
            on_gpu = self._policy.causal_lm.device.type == "cuda"
            self._transport = Broadcast() if on_gpu else SharedFolder()
        server.pause()
        try:
            self._transport.send(server, workers, self._policy, self._label)
            if self.free_memory:
                server.wake("kv_cache")
            server.finish_sync(self._label)
        finally:
            server.resume()

    @staticmethod
    def _check_model(server: VLLMServer, workers: list[dict[str, Any]], policy: Policy) -> None:
        own = policy.causal_lm.config.get_text_config()
        for name, theirs in workers[0]["sizes"].items():
            ours = getattr(own, name, None)
            if None not in (ours, theirs) and ours != theirs:
                raise RefusedError(
                    f"{server} serves another model than model.policy: {name} is {theirs} there and {ours} here; start "
                    "it with the folder or hub id of model.policy"
                )
        tokenizer = policy.tokenizer
        text = str(tokenizer.decode(np.linspace(0, len(tokenizer) - 1, _PROBE_TOKENS).astype(int).tolist()))
        theirs, ours = server.tokenize(text), tokenizer.encode(text, add_special_tokens=False)
        if theirs is not None and theirs != ours:
            raise RefusedError(
                f"{server} has another tokenizer than model.policy: start it with --tokenizer set to that of the "
                "policy, or with --skip-tokenizer-init (token ids are all that is sent)"
            )

    # --- servers -------------------------------------------------------------------------------------------------

    def _live(self) -> list[VLLMServer]:
        lost = self._sessions.lost
        return [server for address, server in self._servers.items() if address not in lost]

    def _give_up(self, server: VLLMServer) -> None:
        self._sessions.lose(server.address)
        warnings.warn(
            f"{server} is away for more than {self.restart_seconds:g} s: the others take over its sessions",
            RuntimeWarning,
            stacklevel=2,
        )
        self._place("")
        self._sessions.end("")

    def _on_all_servers(self, do: Callable[[VLLMServer], Any]) -> None:
        with ThreadPoolExecutor(len(self._servers)) as threads:
            list(threads.map(do, self._servers.values()))

    def _from_first_rank(self, do: Callable[[VLLMServer], Any]) -> None:
        gather(None)
        if rank() == 0:
            for server in self._live():
                with contextlib.suppress(UnreachableError):  # sync, which comes next, waits for it
                    do(server)

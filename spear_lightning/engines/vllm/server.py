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
from typing_extensions import override

from spear_lightning.distributed.collectives import gather, rank
from spear_lightning.engines.base import Completion, Request, RolloutEngine
from spear_lightning.engines.batches import check_requests
from spear_lightning.engines.vllm.client import START, RefusedError, UnreachableError, VLLMServer
from spear_lightning.engines.vllm.requests import StaleWeightsError, completion_of, empty_completion, sampling_fields
from spear_lightning.engines.vllm.routing import StickySessions
from spear_lightning.engines.vllm.transport import Broadcast, SharedFolder, WeightTransport
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.http import retry
from spear_lightning.utils.ranges import Above0, AtLeast0, NotNegative, Positive, in_range

_PROBE_TOKENS = 64


@in_range
class VLLMServerEngine(RolloutEngine):
    """Generates with one or many vLLM servers, which get the policy's weights before every rollout phase.

    Sessions stay with their server, whose prefix cache knows them. Every completion names the version of its weights,
    and is generated again if that is not the current one: a server that was restarted in the middle of a phase answers
    with the weights it was started with, gets the current ones, and only then goes on. Sessions of a server that stays
    away move to the others; only when none is left does the run fail. Of several training ranks the first sends the
    weights, and all of them generate.

    Responses are drawn from the request's seed by the server's own random numbers: the same seed gives the same tokens
    on the same vLLM, and other ones than another engine.

    The environment variable ``VLLM_API_KEY`` holds the servers' API key, if they have one.

    Args:
        addresses: of the servers (``http://localhost:8000``). Start them as ``docs/engines.md`` says.
        transport: of the weights; by default :class:`~spear_lightning.engines.vllm.transport.Broadcast` for a policy on
            a GPU and :class:`~spear_lightning.engines.vllm.transport.SharedFolder` otherwise.
        free_memory: have the servers free weights and cache between rollout phases (they were started with
            ``--enable-sleep-mode``): for servers that share their GPUs with the training.
        parallel: concurrent requests.
        retries: of a request that failed temporarily.
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
        parallel: Positive = 256,
        retries: NotNegative = 8,
        seconds: Above0 = 600.0,
        restart_seconds: AtLeast0 = 180.0,
    ) -> None:
        if not addresses:
            raise ValueError("engine.addresses must name at least one vLLM server")
        for address in addresses:
            if not address.startswith(("http://", "https://")):
                raise ValueError(f"engine.addresses must begin with http:// or https://, not {address!r}")
        servers = [VLLMServer(address, seconds) for address in addresses]
        self._servers = {server.address: server for server in servers}
        if len(self._servers) < len(addresses):
            raise ValueError("engine.addresses names a server twice")
        self.addresses, self.transport, self.free_memory = list(self._servers), transport, free_memory
        self.parallel, self.retries, self.restart_seconds = parallel, retries, restart_seconds
        self._sessions = StickySessions(self.addresses)
        self._policy: Policy | None = None
        self._version, self._label, self._run = 0, "", ""
        self._longest = 0

    # --- the protocol --------------------------------------------------------------------------------------------

    @override
    def prepare(self, policy: Policy, device: torch.device) -> None:
        """Check that all servers are reachable, can take weights and serve the policy's model with its tokenizer.

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
            self._on_all_servers(lambda server: _check_model(server, server.describe(), policy))
        except RefusedError as error:
            raise ValueError(str(error)) from error

    @override
    def sync(self, policy: Policy, version: int) -> None:
        """Send the weights of ``policy`` to all servers, also to those that were given up. Every rank must call it.

        Raises:
            RuntimeError: a server has another model or tokenizer or cannot take the weights, or none can be reached.
        """
        self._policy, self._version = policy, version
        if self.transport is None:
            self.transport = Broadcast() if policy.causal_lm.device.type == "cuda" else SharedFolder()
        self._sessions.first = rank()
        failure = ""
        gather(None)  # no rank generates any more
        if rank() == 0:
            self._run = self._run or uuid.uuid4().hex[:12]
            self._label = f"{self._run}-{version}"
            try:
                self._on_all_servers(self._sync_server)
                self._longest = min(server.context_window() for server in self._live())
            except (RuntimeError, ConnectionError, ValueError) as error:
                failure = str(error)
        told = gather((failure, self._run, self._label, self._longest, self._sessions.lost))
        failure, self._run, self._label, self._longest, self._sessions.lost = told[0]
        if failure:
            raise RuntimeError(failure)

    @override
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See the base class. A prompt that leaves no room in the context window gets an empty completion.

        Raises:
            RuntimeError: before the first :meth:`sync`; a server refuses a request, or none answers after all retries.
            ValueError: a request is malformed.
        """
        if self._policy is None:
            raise RuntimeError("VLLMServerEngine.generate was called before sync: the servers have no weights yet")
        check_requests(requests, self._policy.causal_lm.get_input_embeddings().num_embeddings)
        fields = sampling_fields(requests, self._longest)
        for request, values in zip(requests, fields, strict=True):
            if values:
                self._place(request.session)  # in the order of the requests, whatever thread comes first
        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(self._complete, requests, fields))

    @override
    def end(self, session: str) -> None:
        self._sessions.end(session)

    @override
    def sleep(self) -> None:
        """Have the servers free their memory, if so configured. Every rank must call it."""
        if self.free_memory:
            self._from_first_rank(lambda server: server.sleep())

    @override
    def wake(self) -> None:
        """Have the servers allocate their weights, which :meth:`sync` then sends. Every rank must call it."""
        if self.free_memory:
            self._from_first_rank(lambda server: server.wake("weights"))

    @override
    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        for server in self._servers.values():
            server.close()
        self._policy = None

    # --- one request ---------------------------------------------------------------------------------------------

    def _complete(self, request: Request, fields: dict[str, Any] | None) -> Completion:
        if fields is None:
            return empty_completion(self._version)
        attempts = self.retries + 1
        try:
            return retry(attempts, pause=0.05)(self._attempt, request, fields)
        except (UnreachableError, StaleWeightsError) as error:
            raise RuntimeError(
                f"session {request.session} has no completion after {attempts} attempts: {error}"
            ) from error

    def _attempt(self, request: Request, fields: dict[str, Any]) -> Completion:
        server = self._servers[self._place(request.session)]
        try:
            reply = server.generate(request.prompt_ids.tolist(), fields)
            return completion_of(request, *reply, self._label, self._version)
        except (UnreachableError, StaleWeightsError):
            self._recover(server)
            raise

    def _place(self, session: str) -> str:
        try:
            return self._sessions.place(session)
        except LookupError as error:
            raise RuntimeError(
                f"none of the vLLM servers {', '.join(self.addresses)} (data.engine.addresses) can be reached: "
                f"start them with\n  {START}\nand resume the run"
            ) from error

    def _recover(self, server: VLLMServer) -> None:
        """Send a server the current weights if it does not have them; give it up if it stays away."""
        with server.lock:
            if server.address in self._sessions.lost:
                return
            with contextlib.suppress(UnreachableError):
                if server.healthy() and server.version() == self._label:
                    return
            if not self._send_within(server, self.restart_seconds):
                self._give_up(server)

    # --- weights -------------------------------------------------------------------------------------------------

    def _sync_server(self, server: VLLMServer) -> None:
        with server.lock:
            given_up = server.address in self._sessions.lost
            if self._send_within(server, 0.0 if given_up else self.restart_seconds):
                self._sessions.lost.discard(server.address)
            elif not given_up:
                self._give_up(server)

    def _send_within(self, server: VLLMServer, seconds: float) -> bool:
        """Send the current weights as soon as the server is reachable, within ``seconds``; whether that succeeded."""
        until = time.monotonic() + seconds
        while server.wait(max(0.0, until - time.monotonic())):
            with contextlib.suppress(UnreachableError):  # it died on the way
                self._send_weights(server)
                return True
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        return False

    def _send_weights(self, server: VLLMServer) -> None:
        assert self._policy is not None
        assert self.transport is not None
        workers = server.describe()
        if not server.version().startswith(self._run):  # not the server it was at the last sync
            _check_model(server, workers, self._policy)
        server.pause()
        try:
            self.transport.send(server, workers, self._policy, self._label)
            if self.free_memory:
                server.wake("kv_cache")
            server.finish_sync(self._label)
        finally:
            server.resume()

    # --- servers -------------------------------------------------------------------------------------------------

    def _live(self) -> list[VLLMServer]:
        return [server for address, server in self._servers.items() if address not in self._sessions.lost]

    def _give_up(self, server: VLLMServer) -> None:
        self._sessions.lost.add(server.address)
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


def _check_model(server: VLLMServer, workers: list[dict[str, Any]], policy: Policy) -> None:
    """Refuse a server whose model has other sizes than the policy's, or that tokenizes otherwise.

    Raises:
        RefusedError: it does.
    """
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
    if server.tokenize(text) not in (None, tokenizer.encode(text, add_special_tokens=False)):
        raise RefusedError(
            f"{server} has another tokenizer than model.policy: start it with --tokenizer set to that of the "
            "policy, or with --skip-tokenizer-init (token ids are all that is sent)"
        )

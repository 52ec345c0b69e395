"""A server that speaks vLLM's protocol around a real, tiny policy: routes, weight labels, pauses, weight transfer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch

from spear_lightning.engines.base import Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.engines.vllm.worker import WeightReceiver
from spear_lightning.policy.policy import Policy


class Worker(WeightReceiver):
    """What the receiver is mixed into; loads into the policy."""

    rank, device = 0, torch.device("cpu")

    def __init__(self, policy: Policy) -> None:
        config = policy.causal_lm.config
        model = SimpleNamespace(hf_text_config=config, hf_config=config, dtype=policy.causal_lm.dtype)
        self.vllm_config = SimpleNamespace(model_config=model)
        self.model_runner = SimpleNamespace(get_model=lambda: None)
        self.policy = policy

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.policy.causal_lm.named_parameters())
        with torch.no_grad():
            for name, tensor in weights_iterator:
                own.pop(name).copy_(tensor)
        assert not own, f"not sent: {sorted(own)}"


class ProtocolServer(ThreadingHTTPServer):
    """Serves ``policy`` until :meth:`kill`; ``seen`` holds the requests for responses, ``hook`` may answer them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, policy: Policy, port: int = 0, window: int = 64) -> None:
        self.policy, self.window = policy, window
        self.worker, self.generator = Worker(policy), HuggingFaceEngine(max_length=window)
        self.generator.sync(policy, 0)
        self.version, self.paused, self.mutex = "default", False, threading.RLock()
        self.seen: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.hook: Any = lambda body: None
        self.missing: set[str] = set()
        self.tokenizer = policy.tokenizer
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                status, reply = server.route(url.path, body, query)
                content = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def route(self, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, Any]:
        if path in self.missing:
            return 404, {"detail": "Not Found"}
        if path != "/inference/v1/generate":
            self.calls.append(path if path != "/collective_rpc" else body["method"])
        simple: dict[str, Any] = {
            "/health": lambda: None,
            "/v1/models": lambda: {"data": [{"id": "tiny", "max_model_len": self.window}]},
            "/weight_info": lambda: {"weight_version": self.version},
        }
        if path in simple:
            return 200, simple[path]()
        if path == "/tokenize":
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return 200, {"tokens": ids}
        if path == "/inference/v1/generate":
            return self.generate(body)
        with self.mutex:
            return self.control(path, body, query)

    def control(self, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, Any]:
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path == "/collective_rpc":
            method = getattr(self.worker, body["method"], None)
            if method is None:
                return 500, {"error": f"no method {body['method']}"}
            return 200, {"results": [method(*body["args"])]}
        elif path == "/reset_prefix_cache":
            self.generator.sync(self.policy, 0)
            return 200, {"success": True}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path in ("/sleep", "/wake_up"):
            self.calls[-1] += "".join(query.values())
        else:
            return 404, {"detail": "Not Found"}
        return 200, {}

    def generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.seen.append(body)
        if (answer := self.hook(body)) is not None:
            return answer
        fields = body["sampling_params"]
        if len(body["token_ids"]) + 1 > self.window:
            return 400, {"error": f"the prompt is longer than the context of {self.window} tokens"}
        sampling = Sampling(
            fields["max_tokens"],
            fields["temperature"],
            tuple(fields["stop_token_ids"]),
            fields["top_p"],
            fields["top_k"],
        )
        request = Request("only", np.asarray(body["token_ids"], np.int32), sampling, fields["seed"])
        with self.mutex:
            if self.paused:
                return 200, {"choices": [{"token_ids": [], "finish_reason": "abort", "logprobs": None}]}
            (made,) = self.generator.generate([request])
            version = self.version
        entries = [{"token_id": int(t), "logprob": float(p)} for t, p in zip(made.ids, made.logps, strict=True)]
        spans = [{"version": version, "start": 0, "end": len(entries)}]
        choice = {
            "index": 0,
            "token_ids": made.ids.tolist(),
            "logprobs": {"content": entries},
            "weight_versions": spans,
        }
        return 200, {"choices": [{**choice, "finish_reason": made.finish}]}

"""APIEngine against a real local server that speaks the API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from spear_lightning.engines.api import APIEngine
from spear_lightning.engines.base import Request, Sampling


class Server(ThreadingHTTPServer):
    """Answers with what ``answer`` makes of a request: ``(status, body)``."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answers: Any = lambda body: (200, say("<action> look "))

        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append({"path": self.path, **body})
                server.keys.append(self.headers["Authorization"])
                status, reply = server.answers(body)
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def say(text: str, reason: str = "stop", chat: bool = True) -> dict[str, Any]:
    message = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"choices": [{**message, "finish_reason": reason}]}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def requests(policy: Any, *prompts: str, length: int = 20) -> list[Request]:
    vocabulary = policy.tokenizer.get_vocab()
    stops = (vocabulary["<eos>"], vocabulary["</action>"])
    sampling = Sampling(length, temperature=0.4, stop_ids=stops)
    return [
        Request(str(number), np.asarray(policy.tokenizer.encode(prompt), np.int32), sampling, seed=number)
        for number, prompt in enumerate(prompts)
    ]


def test_texts_go_out_and_tokens_come_back(server, tiny_policy):
    policy = tiny_policy()
    engine = APIEngine(server.address, "large", parallel=4)
    engine.sync(policy, 7)
    found = engine.generate(requests(policy, "<obs> desk 1 </obs>", "look"))
    assert [policy.tokenizer.decode(c.ids) for c in found] == ["<action> look </action>"] * 2, "the stop word is back"
    assert {(c.finish, c.weight_version) for c in found} == {("stop", 7)}
    assert all(np.isnan(c.logps).all() and len(c.logps) == len(c.ids) for c in found)
    sent = next(body for body in server.seen if "desk" in body["messages"][0]["content"])
    assert sent["path"] == "/v1/chat/completions"
    assert sent["messages"] == [{"role": "user", "content": "<obs> desk 1 </obs>"}]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("large", 20, 0.4)
    assert sorted(sent["stop"]) == ["</action>", "<eos>"]
    assert engine.generate([]) == []


def test_raw_completions_lengths_and_keys(server, tiny_policy, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    policy = tiny_policy()
    engine = APIEngine(server.address, "m", endpoint="completions", key="MY_KEY", options={"user": "me"})
    engine.sync(policy, 0)
    server.answers = lambda body: (200, say("go to desk 1 desk 1", "length", chat=False))
    (cut,) = engine.generate(requests(policy, "look", length=3))
    assert (cut.finish, len(cut.ids)) == ("length", 3)
    assert (server.seen[0]["prompt"], server.seen[0]["user"]) == ("look", "me")
    assert server.keys == ["Bearer secret"]
    server.answers = lambda body: (200, say("look", chat=False))
    (ended,) = engine.generate(requests(policy, "look"))
    assert policy.tokenizer.decode(ended.ids) == "look <eos>", "nothing was open: the text had ended"


def test_what_may_pass_is_tried_again_and_what_will_not_is_told(server, tiny_policy, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    engine = APIEngine(server.address, "m", retries=3)
    engine.sync(tiny_policy(), 0)
    (one,) = requests(tiny_policy(), "look")
    replies = iter([(503, b"busy"), (200, b"not json"), (200, {"choices": []}), (200, say("look"))])
    server.answers = lambda body: next(replies)
    assert len(engine.generate([one])) == 1
    server.answers = lambda body: (401, b"who are you?")
    before = len(server.seen)
    with pytest.raises(RuntimeError, match=r"no answer from .*/v1/chat/completions for model 'm': status 401: who are"):
        engine.generate([one])
    assert len(server.seen) == before + 1, "a refusal is not asked again"
    server.answers = lambda body: (500, b"broken")
    with pytest.raises(RuntimeError, match="status 500: broken"):
        engine.generate([one])
    for settings, name in (
        ({"address": "localhost"}, "address"),
        ({"parallel": 0}, "parallel"),
        ({"seconds": 0}, "sec"),
    ):
        with pytest.raises(ValueError, match=name):
            APIEngine(**{"address": server.address, "model": "m", **settings})


@pytest.mark.slow
def test_it_is_evaluated_on_the_same_games_and_never_trained(server, tmp_path):
    from tests.integration.conftest import SMALL
    from tests.processes import spear, start_ranks

    server.answers = lambda body: (200, say(" <action> look"))
    engine = {"class_path": "APIEngine", "init_args": {"address": server.address, "model": "large", "retries": 0}}
    changes = {**SMALL, "run.directory": str(tmp_path / "run"), "data.engine": engine, "data.max_turns": 3}
    keys = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
    arguments = ["-c", "configs/quickstart.yaml", f"--data.environment.cache_dir={tmp_path / 'games'}", *keys]
    ranks = start_ranks(1, spear, ["validate", *arguments], folder=tmp_path / "validate")
    assert ranks.join(120) == [0], ranks.printed()
    found = json.loads((tmp_path / "run/validation.json").read_text())
    assert (found["episodes"], found["success"]["mean"], found["turns"], found["invalid"]) == (8, 0.0, 3.0, 0.0)
    assert len(server.seen) == 24
    ranks = start_ranks(1, spear, ["fit", *arguments], folder=tmp_path / "fit")
    assert ranks.join(120) == [2]
    assert "APIEngine, which can evaluate and not train" in ranks.printed("err")

"""The client against a real local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from spear_lightning.utils import http
from spear_lightning.utils.http import JSONClient, NoAnswerError, StatusError, retry


class Server(ThreadingHTTPServer):
    """Answers with ``answers``, ``(status, body)``, and the last of them for good; remembers requests and peers."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = [(200, b'{"a": 1}')]
        self.seen: list[tuple[str, str, Any]] = []
        self.peers: set[Any] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keeps connections

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.seen.append((self.command, self.path, json.loads(body) if body else None))
                server.peers.add(self.client_address)
                status, content = server.answers[0] if len(server.answers) == 1 else server.answers.pop(0)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def client() -> Iterator[JSONClient]:
    made = JSONClient(10.0)
    yield made
    made.close()


def test_requests_share_a_connection_and_a_closed_client_opens_again(server: Server, client: JSONClient) -> None:
    assert client.request(server.address + "/a?b=c") == {"a": 1}
    assert client.request(server.address + "/d", {"code": "\ud800é"}) == {"a": 1}
    assert server.seen == [("GET", "/a?b=c", None), ("POST", "/d", {"code": "\ud800é"})]
    assert len(server.peers) == 1
    client.close()
    client.close()
    server.answers = [(200, b"")]
    assert client.request(server.address) is None
    assert len(server.peers) == 2


def test_many_threads_at_a_time(server: Server, client: JSONClient) -> None:
    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda number: client.request(server.address, {"n": number}), range(200)))
    assert found == [{"a": 1}] * 200
    assert sorted(body["n"] for _, _, body in server.seen) == list(range(200))


@pytest.mark.parametrize(
    "content", [b"no json", b'{"a": ', b"[" * 200_000 + b"]" * 200_000, b'{"a": 1}' + b" " * 2000 + b"x" * 3000]
)
def test_what_is_not_json_is_no_answer(server: Server, client: JSONClient, content: bytes) -> None:
    server.answers = [(200, content)]
    with pytest.raises(NoAnswerError):
        client.request(server.address)


def test_an_answer_is_read_up_to_a_limit(server: Server, client: JSONClient, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [(200, b'"' + b"x" * 5000 + b'"')]
    assert len(client.request(server.address)) == 5000
    monkeypatch.setattr(http, "_MAX_BYTES", 1000)
    with pytest.raises(NoAnswerError, match="Unterminated string"):
        client.request(server.address)
    server.answers = [(404, b"x" * 100_000)]
    with pytest.raises(StatusError, match=r"^status 404: x{2000}$"):
        client.request(server.address)


def test_nobody_there(client: JSONClient) -> None:
    gone = Server()
    gone.server_close()
    for url in (gone.address, "http://[", "ftp://localhost"):
        with pytest.raises(NoAnswerError):
            client.request(url)


def test_silence_is_no_answer(client: JSONClient) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NoAnswerError, match="Timeout"):
        client.request(f"http://127.0.0.1:{silent.getsockname()[1]}", {}, seconds=0.05)


def test_what_is_tried_again_and_how_long_it_pauses(
    server: Server, client: JSONClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.answers = [(503, b"busy"), (429, b"slow down"), (200, b"no json"), (200, b"1")]
    assert retry(4, 0.5)(client.request, server.address) == 1
    assert pauses == [0.5, 1.0, 2.0]
    pauses.clear()
    server.answers = [(500, b"broken")]
    with pytest.raises(StatusError, match="status 500: broken"):
        retry(9, 0.5)(client.request, server.address)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    server.answers = [(401, b"who?"), (200, b"1")]
    with pytest.raises(StatusError, match="status 401: who") as refused:
        retry(4, 0.5)(client.request, server.address)
    assert refused.value.status == 401
    assert len(server.answers) == 1, "a refusal is not repeated"

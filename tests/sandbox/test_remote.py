"""The HTTP client against a real server that speaks SandboxFusion's protocol."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from spear_lightning.sandbox import RemoteSandbox, SandboxError, SandboxLimits, open_sandbox

LIMITS = SandboxLimits(wall_seconds=1.0, memory_mb=256, output_bytes=1000)


class Service(ThreadingHTTPServer):
    """Runs the honest snippets of these tests, and fails as it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[tuple[int, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **body})
        self.server.headers.append(dict(self.headers))
        if self.server.failures:
            status, answer = self.server.failures.pop(0)
        else:
            status, answer = 200, json.dumps(run(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


def run(body: dict[str, Any]) -> dict[str, Any]:
    """What SandboxFusion answers for a script."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", body["code"]], capture_output=True, text=True, timeout=body["run_timeout"]
        )
    except subprocess.TimeoutExpired:
        result = {"status": "TimeLimitExceeded", "execution_time": body["run_timeout"], "stdout": "", "stderr": ""}
        return {"status": "Failed", "message": "", "compile_result": None, "run_result": result, "files": {}}
    result = {
        "status": "Finished",
        "execution_time": time.monotonic() - started,
        "return_code": done.returncode,
        "stdout": done.stdout,
        "stderr": done.stderr,
    }
    status = "Success" if done.returncode == 0 else "Failed"
    return {"status": status, "message": "", "compile_result": None, "run_result": result, "files": {}}


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_lightning.sandbox.remote._PAUSE_SECONDS", 0.01)


def test_a_snippet_there_and_back(service: Service) -> None:
    with open_sandbox("remote", LIMITS, url=service.url + "/", headers={"Authorization": "Bearer x"}) as sandbox:
        result = sandbox.run("import sys\nprint('one'); print('careful', file=sys.stderr)")
    assert (result.stdout, result.error, result.stderr) == ("one\n", "", "careful\n")
    assert service.requests[-1]["path"] == "/run_code"
    assert service.requests[-1]["language"] == "python"
    assert service.requests[-1]["run_timeout"] == 1.0
    assert service.requests[-1]["memory_limit_MB"] == 256
    assert service.headers[-1]["Authorization"] == "Bearer x"


def test_what_goes_wrong_in_a_snippet_is_its_error(service: Service) -> None:
    with RemoteSandbox(service.url, LIMITS) as sandbox:
        raised = sandbox.run("print('before')\n1 / 0")
        assert raised.stdout == "before\n"
        assert raised.error.endswith("ZeroDivisionError: division by zero")
        assert sandbox.run("raise SystemExit(3)").error == "exit code 3"
        assert sandbox.run("while True: pass").error == "killed after 1 s"
        assert sandbox.run("print('x' * 5000)").stdout == "x" * 1000


@pytest.mark.parametrize(
    "failure", [(503, b"busy"), (429, b"slow down"), (200, b"no json"), (200, b'{"status": "SandboxError"}')]
)
def test_a_service_that_fails_for_a_moment_is_asked_again(service: Service, failure: tuple[int, bytes]) -> None:
    with RemoteSandbox(service.url, LIMITS) as sandbox:
        service.failures = [failure, failure]
        assert sandbox.run("print(1)").stdout == "1\n"
        service.failures = [failure] * 3
        with pytest.raises(SandboxError, match=service.url):
            sandbox.run("print(1)")


def test_a_refusal_is_not_repeated(service: Service) -> None:
    service.failures = [(401, b"no")] * 2
    with pytest.raises(SandboxError, match="401"):
        RemoteSandbox(service.url, LIMITS).open()
    assert len(service.requests) == 1


def test_nobody_there() -> None:
    server = Service()
    server.server_close()
    with pytest.raises(SandboxError, match="cannot be used"):
        RemoteSandbox(server.url, LIMITS).open()


def test_a_service_that_runs_something_else(service: Service) -> None:
    service.failures = [(200, json.dumps({"status": "Success", "run_result": {"stdout": "43\n"}}).encode())]
    with pytest.raises(SandboxError, match="does not run Python"):
        RemoteSandbox(service.url, LIMITS).open()


def test_no_sessions(service: Service) -> None:
    with RemoteSandbox(service.url, LIMITS) as sandbox, pytest.raises(SandboxError, match="no sessions"):
        sandbox.session()


def test_settings_are_checked_and_pickled() -> None:
    with pytest.raises(ValueError, match="http"):
        RemoteSandbox("file:///etc/passwd")
    with pytest.raises(ValueError, match="attempts"):
        RemoteSandbox("http://localhost", attempts=0)
    copy = pickle.loads(pickle.dumps(RemoteSandbox("http://localhost/", LIMITS)))
    assert (copy.url, copy.limits) == ("http://localhost", LIMITS)

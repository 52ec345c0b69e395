"""The client of the grading process: asks whether an answer is right, and never waits much longer than its limit."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import weakref
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

_START_SECONDS = 120.0  # to start an interpreter and import sympy, on a busy machine
_SLACK_SECONDS = 10.0  # the helper keeps the limit itself; this is for when even that hangs
_LAUNCH = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from spear_lightning.environments.math.verifier_process import serve; serve(int(sys.argv[1]))"
)


class Verifier:
    """Judges answers with math-verify in a process of its own, which starts at the first question.

    Args:
        seconds: time limit of one question, wall-clock.
        megabytes: memory limit of one question.
    """

    def __init__(self, seconds: float, megabytes: int) -> None:
        self.seconds, self.megabytes = seconds, megabytes
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_connection": None}

    def require(self) -> None:
        """See to it that math-verify is installed.

        Raises:
            ValueError: it is not.
        """
        if find_spec("math_verify") is None:
            raise ValueError("the grader MathVerify needs math-verify: pip install 'spear-lightning[math]'")

    def equal(self, reference: str, answer: str) -> bool:
        """Whether ``answer`` (a text with an answer in it) equals ``reference``; false where it cannot be told in time.

        Raises:
            RuntimeError: the grading process does not start.
        """
        question = {"reference": reference, "answer": answer, "seconds": self.seconds, "megabytes": self.megabytes}
        for _ in range(2):  # a process that was killed meanwhile says nothing about the answer
            connection = self._started()
            try:
                connection.send_bytes(json.dumps(question).encode())
                if connection.poll(self.seconds + _SLACK_SECONDS):
                    return connection.recv_bytes(1) == b"1"
            except (OSError, EOFError):
                self.close()
                continue
            self.close()  # it hangs
            return False
        return False

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        self.require()
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), json.dumps([str(path) for path in sys.path])]
            # In the worker's own process group: whoever kills the worker kills it too.
            process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        connection = Connection(ours.detach())
        weakref.finalize(self, _end, process, os.getpid())
        self._process, self._connection = process, connection
        with contextlib.suppress(OSError, EOFError):
            if connection.poll(_START_SECONDS) and connection.recv_bytes(1) == b"R":
                return connection
        self.close()
        raise RuntimeError(f"the grading process does not start (exit code {process.returncode}); its output says why")


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:
        process.kill()
        process.wait()

"""The grading process: imports math-verify once, then forks for each question and kills what does not come to an end.

A fork costs a few milliseconds and buys everything: a question has its own time and memory limits, enforced from
outside by processes that compute nothing, and whatever it does to the interpreter dies with it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import select
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


def judge(reference: str, answer: str) -> bool:
    r"""What math-verify says, without time limits of its own.

    The reference is taken as one expression, whether it stands between dollars or not.
    """
    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    # math-verify's own limits are whole seconds, kept by an alarm that native code does not hear.
    wanted = parse(f"\\boxed{{{reference}}}" if "$" not in reference else reference, parsing_timeout=None)
    found = parse(answer, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)
    return bool(verify(wanted, found, timeout_seconds=None))


def serve(descriptor: int) -> None:
    """Answer questions from the socket ``descriptor`` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    logging.disable(logging.ERROR)  # math-verify reports every answer that it cannot parse
    connection = Connection(descriptor)
    judge("1", "$\\frac{1}{2}x^2$")  # builds the parser's tables, which every fork then has
    gc.disable()  # a collection in a fork would touch, and so copy, all the memory that it shares
    connection.send_bytes(b"R")
    with suppress(EOFError, OSError):
        while True:
            question = json.loads(connection.recv_bytes())
            connection.send_bytes(b"1" if _judged_apart(question) else b"0")


def _judged_apart(question: dict[str, Any]) -> bool:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(question, writing)
    os.close(writing)
    try:
        end = time.monotonic() + question["seconds"]
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        return bool(ready) and os.read(reading, 1) == b"1"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _child(question: dict[str, Any], writing: int) -> None:
    """The life of a fork; never returns."""
    with suppress(BaseException):
        # If the process that forked us is killed, nobody is left to kill us: the kernel does it by these.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, question["seconds"] + 5)
        limit = question["megabytes"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.write(writing, b"1" if judge(question["reference"], question["answer"]) else b"0")
    os._exit(0)

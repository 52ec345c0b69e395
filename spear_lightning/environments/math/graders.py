r"""Graders: whether the final message of a model answers a problem."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import weakref
from abc import ABC, abstractmethod
from functools import cached_property
from importlib.util import find_spec
from multiprocessing.connection import Connection

from typing_extensions import override

from spear_lightning.environments.base import Settings
from spear_lightning.environments.math.problems import Problem, ProblemSource
from spear_lightning.environments.worker_process import start_helper
from spear_lightning.utils.ranges import Above0, Positive, Share, in_range

_BOX = "\\boxed{"
_START_SECONDS = 120.0  # to start an interpreter and import sympy, on a busy machine
_SLACK_SECONDS = 10.0  # the helper keeps the limit itself; this is for when even that hangs


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{…}`` of a text; ``None`` if there is none or its braces are not balanced.

    Takes linear time. Braces are counted as TeX's own would be, but for escapes: ``\{`` counts like ``{``, as in the
    graders of the published runs.
    """
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(_BOX) - 1, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start + len(_BOX) : position]
    return None


def answer_of(text: str) -> str:
    r"""The answer in a final message, for votes over several attempts: the last box, or else the end of the text.

    >>> answer_of("So it is \\boxed{ 4 }."), answer_of("It is\n  4")
    ('4', 'It is 4')
    """
    end = text[-1000:]
    return " ".join((last_box(end) or end[-100:]).split())


class Grader(Settings, ABC):
    """Grades final messages. Must be picklable and cheap to make; it is used in one thread of a worker process."""

    def check(self, source: ProblemSource) -> None:
        """See to it that the problems of ``source`` can be graded.

        Raises:
            ValueError: they cannot; the message names the fix.
        """

    @abstractmethod
    def grade(self, text: str, problem: Problem) -> bool:
        """Whether a message answers the problem. Whatever the message is, it takes bounded time.

        Args:
            text: the whole final message.
            problem: with its reference answer.
        """

    def close(self) -> None:
        """Free what it holds; it may be used again."""


@in_range
class StrictBox(Grader):
    r"""The grader of the published runs: what stands in the last ``\boxed{…}`` near the end is the answer, verbatim.

    Args:
        characters: only so many at the end of the message are read.

    Raises:
        ValueError: ``characters`` is not positive.
    """

    def __init__(self, characters: Positive = 100) -> None:
        self.characters = characters

    @override
    def grade(self, text: str, problem: Problem) -> bool:
        """Whether the box holds exactly the reference answer (but for white space around it)."""
        found = last_box(text[-self.characters :])
        return found is not None and found.strip() == problem.answer


@in_range
class OwnScorer(Grader):
    r"""The scorer that problems bring along (those of reasoning-gym), on what stands in the last ``\boxed{…}``.

    Args:
        threshold: the least score of a right answer.
        characters: a longer answer is wrong.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, threshold: Share = 1.0, characters: Positive = 1000) -> None:
        self.threshold, self.characters = threshold, characters

    @override
    def check(self, source: ProblemSource) -> None:
        """See to it that every problem has a scorer.

        Raises:
            ValueError: one has none.
        """
        without = next((problem for problem in source.problems() if problem.scorer is None), None)
        if without is not None:
            kind = f" of type {without.task_type}" if without.task_type else ""
            raise ValueError(
                f"{source}: problems{kind} have no scorer that is safe to use on what a model wrote; set "
                "environment.init_args.grader to MathVerify or StrictBox"
            )

    @override
    def grade(self, text: str, problem: Problem) -> bool:
        """Whether the score of what is in the box reaches the threshold."""
        found = last_box(text)
        if found is None or problem.scorer is None or len(found) > self.characters:
            return False
        return float(problem.scorer(found.strip())) >= self.threshold


@in_range
class MathVerify(Grader):
    """Mathematical equality by `math-verify`: ``1/2`` is ``0.5``, ``(x+1)^2`` is ``x^2+2x+1``.

    It parses LaTeX and computes with what it finds, which can take for ever; so it runs in a helper process, under
    limits of time and memory, and an answer that goes beyond them is wrong.

    Args:
        seconds: time limit of one answer, wall-clock. Keep it well below ``data.step_timeout``.
        megabytes: memory limit of one answer.
        characters: only so many at the end of the message are read.

    Raises:
        ValueError: a limit is not positive.
    """

    def __init__(self, seconds: Above0 = 5.0, megabytes: Positive = 2048, characters: Positive = 8000) -> None:
        self.seconds, self.megabytes, self.characters = seconds, megabytes, characters

    @override
    def check(self, source: ProblemSource) -> None:
        """See to it that math-verify is there.

        Raises:
            ValueError: it is not installed.
        """
        if find_spec("math_verify") is None:
            raise ValueError("the grader MathVerify needs math-verify: pip install 'spear-lightning[math]'")

    @override
    def grade(self, text: str, problem: Problem) -> bool:
        """Whether math-verify takes the message for the reference answer; false where it cannot tell in time.

        Raises:
            RuntimeError: the grading process does not start.
        """
        limits = {"seconds": self.seconds, "megabytes": self.megabytes}
        question = {"reference": problem.answer, "answer": text[-self.characters :], **limits}
        for _ in range(2):  # a process that was killed meanwhile says nothing about the answer
            connection = self._helper[1]
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

    @override
    def close(self) -> None:
        helper = vars(self).pop("_helper", None)
        if helper is not None:
            process, connection = helper
            connection.close()
            process.kill()
            process.wait()

    @cached_property
    def _helper(self) -> tuple[subprocess.Popen[bytes], Connection]:
        """The grading process and the pipe to it, started at the first question."""
        # In the worker's own process group: whoever kills the worker kills it too.
        process, connection = start_helper("spear_lightning.environments.math.verifier_process.serve")
        weakref.finalize(self, _end, process, os.getpid())
        with contextlib.suppress(OSError, EOFError):
            if connection.poll(_START_SECONDS) and connection.recv_bytes(1) == b"R":
                return process, connection
        connection.close()
        process.kill()
        process.wait()
        raise RuntimeError(f"the grading process does not start (exit code {process.returncode}); its output says why")


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and process.poll() is None:
        process.kill()
        process.wait()

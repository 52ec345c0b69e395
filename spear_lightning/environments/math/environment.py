"""One problem, one episode: a turn is either tool calls, which are run and answered, or the final answer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from spear_lightning.environments.math.graders import Grader, answer_of
from spear_lightning.environments.math.problems import Problem
from spear_lightning.environments.text import TextEnv
from spear_lightning.environments.tools import CODE_INTERPRETER, ToolCall, parse_calls, write_results

if TYPE_CHECKING:
    from spear_lightning.sandbox import Sandbox


class Interpreter:
    """The sandbox that the environments of a process share: opened at the first use, opened again if it broke.

    Args:
        open_sandbox: makes a sandbox.
        output_characters: a longer output is cut in its middle.
    """

    def __init__(self, open_sandbox: Callable[[], Sandbox], output_characters: int) -> None:
        self._open = open_sandbox
        self._sandbox: Sandbox | None = None
        self.output_characters = output_characters

    def open(self) -> Sandbox:
        """The sandbox, opened now, so that one that cannot work is found out at the start.

        Raises:
            Exception: whatever the sandbox says.
        """
        if self._sandbox is None:
            self._sandbox = self._open()
        return self._sandbox

    def run(self, code: str) -> str:
        """What a program printed, and its error if it failed, for the model to read.

        Raises:
            Exception: the sandbox broke, and a second one too.
        """
        try:
            outcome = self.open().run(code)
        except Exception:
            self.close()
            outcome = self.open().run(code)
        parts = [self._cut(outcome.stdout.rstrip("\n"))] if outcome.stdout else []
        parts += [f"Error: {self._cut(outcome.error.strip())}"] if outcome.error else []
        return "\n".join(parts) or "The program ended and printed nothing. Print what you want to see."

    def close(self) -> None:
        """Close the sandbox, if it is open."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            with contextlib.suppress(Exception):  # a broken sandbox need not be able to say goodbye
                sandbox.close()

    def _cut(self, text: str) -> str:
        left_out = len(text) - self.output_characters
        if left_out <= 0:
            return text
        half = self.output_characters // 2
        return f"{text[:half]}\n[{left_out} characters left out]\n{text[len(text) - half :]}"


class MathEnv(TextEnv):
    """Poses problems. Actions are the messages of a model, observations the results of their tool calls.

    A message with tool calls has them run, and is answered with their results
    (:func:`~spear_lightning.environments.tools.write_results`); any other message is the final answer: it is graded and
    ends the episode. The reward is 1 for a right answer.

    Args:
        pose: the problem of a task id, and what grades it.
        interpreter: runs code; ``None`` has no tool: every message is a final answer.
        instruction: put after each question.
        max_turns: messages after which the episode is cut.
        code_seconds: the calls of a message that are not begun after so many seconds are not made.
    """

    def __init__(
        self,
        pose: Callable[[str], tuple[Problem, Grader]],
        interpreter: Interpreter | None,
        instruction: str,
        max_turns: int,
        code_seconds: float,
    ) -> None:
        super().__init__(max_turns)
        self._pose, self._interpreter = pose, interpreter
        self._instruction, self._code_seconds = instruction, code_seconds
        self._outcome: dict[str, Any] = {}

    @override
    def _begin(self, task: str) -> str:
        self._problem, self._grader = self._pose(task)
        self._outcome = {"won": False}
        return "\n\n".join(part for part in (self._problem.question, self._instruction) if part)

    @override
    def _act(self, action: str) -> tuple[str, float, bool]:
        calls = parse_calls(action, [CODE_INTERPRETER]) if self._interpreter is not None else []
        if not calls:
            right = self._grader.grade(action, self._problem)
            self._outcome = {"won": right, "answer": answer_of(action)}
            return "", float(right), True
        if self._steps + 1 >= self._max_steps:
            return "", 0.0, False  # nobody is left to read what the calls would bring
        return write_results(self._answers(calls)), 0.0, False

    @override
    def _info(self) -> dict[str, Any]:
        return dict(self._outcome)

    def _answers(self, calls: list[ToolCall]) -> list[tuple[str, str]]:
        assert self._interpreter is not None
        end = time.monotonic() + self._code_seconds
        answers = []
        for call in calls:
            error = call.error
            if not error and time.monotonic() >= end:
                error = "not run: the calls before it took too long"
            answer = f"Error: {error}" if error else self._interpreter.run(call.arguments["code"])
            answers.append((call.name or CODE_INTERPRETER.name, answer))
        return answers

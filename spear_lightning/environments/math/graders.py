r"""Graders: whether the final message of a model answers a problem."""

from __future__ import annotations

from abc import ABC, abstractmethod

from spear_lightning.environments.math.problems import Problem, ProblemSource
from spear_lightning.environments.math.verifier import Verifier

_BOX = "\\boxed{"


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


class Grader(ABC):
    """Grades final messages. Must be picklable and cheap to make; it is used in one thread of a worker process."""

    def check(self, source: ProblemSource) -> None:  # noqa: B027 - most graders can grade any problem
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

    def close(self) -> None:  # noqa: B027 - most graders hold nothing
        """Free what it holds; it may be used again."""


class StrictBox(Grader):
    r"""The grader of the published runs: what stands in the last ``\boxed{…}`` near the end is the answer, verbatim.

    Args:
        characters: only so many at the end of the message are read.

    Raises:
        ValueError: ``characters`` is not positive.
    """

    def __init__(self, characters: int = 100) -> None:
        if characters < 1:
            raise ValueError(f"StrictBox.characters must be at least 1, not {characters}")
        self.characters = characters

    def grade(self, text: str, problem: Problem) -> bool:
        """Whether the box holds exactly the reference answer (but for white space around it)."""
        found = last_box(text[-self.characters :])
        return found is not None and found.strip() == problem.answer


class OwnScorer(Grader):
    r"""The scorer that problems bring along (those of reasoning-gym), on what stands in the last ``\boxed{…}``.

    Args:
        threshold: the least score of a right answer.
        characters: a longer answer is wrong.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, threshold: float = 1.0, characters: int = 1000) -> None:
        if not 0 < threshold <= 1 or characters < 1:
            raise ValueError(
                f"OwnScorer.threshold must be in (0, 1] and characters at least 1, not {threshold} and {characters}"
            )
        self.threshold, self.characters = threshold, characters

    def check(self, source: ProblemSource) -> None:
        """See to it that every problem has a scorer.

        Raises:
            ValueError: one has none.
        """
        without = next((problem for problem in source.problems() if problem.scorer is None), None)
        if without is not None:
            kind = f" of kind {without.kind}" if without.kind else ""
            raise ValueError(
                f"{source}: problems{kind} have no scorer that is safe to use on what a model wrote; set "
                "environment.init_args.grader to MathVerify or StrictBox"
            )

    def grade(self, text: str, problem: Problem) -> bool:
        """Whether the score of what is in the box reaches the threshold."""
        found = last_box(text)
        if found is None or problem.scorer is None or len(found) > self.characters:
            return False
        return float(problem.scorer(found.strip())) >= self.threshold


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

    def __init__(self, seconds: float = 5.0, megabytes: int = 2048, characters: int = 8000) -> None:
        for name, value in (("seconds", seconds), ("megabytes", megabytes), ("characters", characters)):
            if not value > 0:
                raise ValueError(f"MathVerify.{name} must be positive, not {value}")
        self.characters = characters
        self._verifier = Verifier(seconds, megabytes)

    def check(self, source: ProblemSource) -> None:
        """See to it that math-verify is there.

        Raises:
            ValueError: it is not installed.
        """
        self._verifier.require()

    def grade(self, text: str, problem: Problem) -> bool:
        """Whether math-verify takes the message for the reference answer; false where it comes to no end."""
        return self._verifier.equal(problem.answer, text[-self.characters :])

    def close(self) -> None:
        """End the helper process."""
        self._verifier.close()

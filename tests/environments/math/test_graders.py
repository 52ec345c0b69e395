from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import math_verify
import pytest

from spear_lightning.environments.math import GeneratedProblems, MathVerify, OwnScorer, StrictBox
from spear_lightning.environments.math.graders import last_box
from spear_lightning.environments.math.problems import Problem

BOX = r"\boxed"


@pytest.fixture(scope="module")
def grader() -> Iterator[MathVerify]:
    # As many seconds as a busy machine may need for what takes milliseconds.
    made = MathVerify(seconds=20.0)
    yield made
    made.close()


def answers(grader: MathVerify | StrictBox | OwnScorer, text: str, answer: str) -> bool:
    return grader.grade(text, Problem("?", answer))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{}", ""),
        (r"\boxed{4", None),
        (r"\boxed 4", None),
        ("", None),
        (r"\boxed{" * 200_000, None),
        (r"\boxed{" + "{" * 200_000 + "}" * 200_001, "{" * 200_000 + "}" * 200_000),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_strict_box_takes_the_last_hundred_characters_verbatim() -> None:
    grader = StrictBox()
    assert answers(grader, r"So it is \boxed{ 34 }.", "34")
    assert not answers(grader, r"So it is \boxed{34.0}.", "34")
    assert not answers(grader, "So it is 34.", "34")
    assert answers(grader, r"\boxed{34}" + "." * 90, "34")
    assert not answers(grader, r"\boxed{34}" + "." * 91, "34")
    assert answers(StrictBox(101), r"\boxed{34}" + "." * 91, "34")
    assert not answers(grader, r"\boxed{34} no, \boxed{35}", "34")


def test_own_scorers_are_asked_about_the_box() -> None:
    [problem] = GeneratedProblems(kinds=["chain_sum"], count=1, seed=3).problems()
    grader = OwnScorer()
    assert grader.grade(rf"\boxed{{{problem.answer}.0}}", problem), "its own tolerance"
    assert not grader.grade(problem.answer, problem)
    assert not grader.grade(rf"\boxed{{{problem.answer} or so}}", problem), "a part of the score is not enough"
    assert OwnScorer(threshold=0.3).grade(rf"\boxed{{{problem.answer} or so}}", problem)
    assert not OwnScorer(characters=2).grade(rf"\boxed{{{problem.answer}}}", problem)
    with pytest.raises(ValueError, match=r"problems of type polynomial_multiplication have no scorer .* MathVerify"):
        grader.check(GeneratedProblems(kinds=["chain_sum", "polynomial_multiplication"], count=2))
    grader.check(GeneratedProblems(count=7))


# What math-verify documents: its README, the examples of its docstrings, and the formats that they list.
DOCUMENTED = [
    (r"${1,3} \cup {2,4}$", "${1,2,3,4}$", True),
    (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$", True),
    (r"\frac{1}{2}", "The answer is 1/2", True),
    (r"\frac{1}{3}", "0.333333", True),
    ("x + 1", "$y + 1$", False),
    (r"\sqrt{2}", r"\[ \sqrt{2} \]", True),
    ("9999", "9,999", True),
    ("0.09", r"\boxed{9\%}", True),
    ("(1,2)", r"\boxed{(1,2)}", True),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x > 1", r"\boxed{1 < x}", True),
    ("12", r"\boxed{13}", False),
]


@pytest.mark.parametrize(("reference", "text", "right"), DOCUMENTED)
def test_math_verify_agrees_with_itself(grader: MathVerify, reference: str, text: str, right: bool) -> None:
    wanted = reference if "$" in reference else f"${reference}$"
    assert math_verify.verify(math_verify.parse(wanted), math_verify.parse(text)) is right, "the example"
    assert answers(grader, text, reference) is right


HOSTILE = [
    r"\boxed{10^{10^{10}}}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{100000000!}",
    r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n}}",
    BOX + "{" * 5000 + "}" * 5000,
    "The answer is 9**9**9**9",
]


@pytest.fixture(scope="module")
def hurried() -> Iterator[MathVerify]:
    made = MathVerify(seconds=1.0)
    yield made
    made.close()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_cost_at_most_the_limit(hurried: MathVerify, text: str) -> None:
    answers(hurried, "", "12")  # starts it
    started = time.monotonic()
    assert not answers(hurried, text, "12")
    assert time.monotonic() - started < 4.5
    assert answers(hurried, r"\boxed{2}", "2"), "the next one is graded as ever"


def test_answers_are_not_evaluated(grader: MathVerify, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"open('{marker}', 'w').close()"
    for text in (code, f"\\boxed{{{code}}}", f"${code}$", f"The answer is {code}", f"\\boxed{{1}} = {code}"):
        answers(grader, text, "12")
    assert not marker.exists()


def test_a_grading_process_that_dies_is_replaced(grader: MathVerify) -> None:
    assert answers(grader, r"\boxed{2}", "2")
    process = grader._helper[0]
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert answers(grader, r"\boxed{2}", "2")


def test_the_memory_of_an_answer_is_limited() -> None:
    grader = MathVerify(seconds=20.0, megabytes=50)  # less than the interpreter has already
    try:
        assert not answers(grader, r"\boxed{(x+1)^2}", "x^2+2x+1")
    finally:
        grader.close()


def test_graders_are_sent_to_workers_without_their_process(grader: MathVerify) -> None:
    assert answers(grader, r"\boxed{2}", "2")
    copy = pickle.loads(pickle.dumps(grader))
    assert "_helper" not in vars(copy)


def test_bad_limits_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"MathVerify.seconds must be above 0"):
        MathVerify(seconds=0)
    with pytest.raises(ValueError, match=r"StrictBox.characters must be at least 1"):
        StrictBox(0)
    with pytest.raises(ValueError, match=r"OwnScorer.threshold must be above 0 and at most 1"):
        OwnScorer(threshold=1.5)

r"""Written demonstrations: sums that are answered at once, or by a call of the code interpreter.

Some problems are answered at once (``\boxed{144}``), which a small model gets right only now and then, others by a
program that computes the expression of the question. Which way is better is left to reinforcement learning::

    spear sft -c configs/sft/math.yaml
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.data.samples import Sample
from spear_lightning.environments.base import Task, TaskSuite
from spear_lightning.environments.math import MathProblems
from spear_lightning.environments.tools import CALL_TAGS, CODE_INTERPRETER, write_results
from spear_lightning.sft.chat_tokenizer import build_chat_tokenizer
from spear_lightning.sft.demonstrations import Demonstrations
from spear_lightning.sft.module import sample_of
from spear_lightning.utils.randomness import stream_seed
from spear_lightning.utils.ranges import Fraction, in_range

_EXPRESSION = re.compile(r"\d[\d+*/(). -]*\d")
_KINDS = ("chain_sum", "products")


@dataclass(frozen=True)
class Solution:
    """One problem, and how it is solved.

    Attributes:
        task: the problem.
        question: as the environment puts it.
        replies: what the policy should write, in order; each but the last is answered by a result.
        result: that a program prints.
    """

    task: Task
    question: str
    replies: tuple[str, ...]
    result: str

    def texts(self) -> Iterator[str]:
        """Everything that the policy reads and writes but for results."""
        yield self.question
        yield from self.replies


@in_range
class WrittenSolutions(Demonstrations):
    """Solutions of ``MathProblems`` whose questions ask for the value of an expression.

    Args:
        agent: that will play with the policy.
        direct: share of problems that are answered at once, without the tool.
        vocabulary: size of the tokenizer's, at least 300.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, agent: ChatToolAgent, direct: Fraction = 0.5, vocabulary: int = 512) -> None:
        self.agent, self.direct, self.vocabulary = agent, direct, vocabulary

    @override
    def collect(self, suite: TaskSuite, *, workers: int, seed: int) -> list[Solution]:
        if not isinstance(suite, MathProblems):
            raise ValueError(f"environment: WrittenSolutions are of MathProblems, not of {type(suite).__name__}")
        random = np.random.default_rng(stream_seed("math demonstrations", seed))
        return [self._solve(suite, task, random) for task in suite.tasks("train")]

    def _solve(self, suite: MathProblems, task: Task, random: np.random.Generator) -> Solution:
        problem, _ = suite.pose(task.id)
        if problem.task_type not in _KINDS:
            raise ValueError(
                f"environment: problems to demonstrate must be of the kinds {' and '.join(_KINDS)}, whose questions "
                f"are an expression to compute, not {problem.task_type or 'without a type'}"
            )
        expression = max(_EXPRESSION.findall(problem.question), key=len)
        call = {"name": CODE_INTERPRETER.name, "arguments": {"code": f"print({expression})"}}
        answer = f"\\boxed{{{problem.answer}}}"
        at_once = suite.tool is None or random.random() < self.direct
        replies = (answer,) if at_once else (f"{CALL_TAGS[0]}{json.dumps(call)}{CALL_TAGS[1]}", answer)
        question = "\n\n".join(part for part in (problem.question, suite.instruction) if part)
        return Solution(task, question, replies, problem.answer)

    @override
    def build_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        return build_chat_tokenizer(list(texts), self.vocabulary)

    @override
    def make_agent(self) -> ChatToolAgent:
        return self.agent

    @override
    def encode(self, demonstration: Solution, agent: ChatToolAgent) -> list[Sample]:
        pieces = [(agent.opening("", demonstration.question).ids, False)]
        for number, reply in enumerate(demonstration.replies):
            if number:
                result = write_results([(CODE_INTERPRETER.name, demonstration.result)])
                pieces.append((agent.continuation_ids(pieces[-1][0], result), False))
            pieces.append((agent.encode(reply + agent.format.end), True))
        return [sample_of(pieces)]

    @override
    def describe(self, demonstrations: Sequence[Solution]) -> str:
        called = sum(len(solution.replies) > 1 for solution in demonstrations)
        return f"{len(demonstrations)} written solutions, {called} of them by a program"

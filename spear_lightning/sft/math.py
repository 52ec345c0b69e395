r"""``spear warmstart-math``: from nothing to a small policy that reads sums and calls the code interpreter.

Its demonstrations are written, not played: some problems are answered at once (``\boxed{144}``), which a small model
gets right only now and then, others by a program that computes the expression of the question. Which way is better is
left to reinforcement learning::

    spear warmstart-math -c configs/small/warmstart-math.yaml
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.environments.math import MathProblems
from spear_lightning.environments.tools import CALL_TAGS, CODE_INTERPRETER, write_results
from spear_lightning.policy.loading import fresh_model
from spear_lightning.sft.chat_tokenizer import build_chat_tokenizer
from spear_lightning.sft.command import run_command
from spear_lightning.sft.demonstrations import TokenRow
from spear_lightning.sft.evaluation import HeldOut, Score, evaluate
from spear_lightning.sft.module import Optimization, fit_rows
from spear_lightning.utils.randomness import stream_seed

_EXPRESSION = re.compile(r"\d[\d+*/(). -]*\d")
_KINDS = ("chain_sum", "products")
_VALIDATION = 25  # one demonstration in so many is only used for the validation loss


@dataclass(frozen=True)
class Demonstration:
    """One problem, and how it is solved.

    Attributes:
        question: as the environment puts it.
        replies: what the policy should write, in order; each but the last is answered by a result.
        result: that a program prints.
    """

    question: str
    replies: tuple[str, ...]
    result: str


def demonstrate(suite: MathProblems, direct: float, seed: int) -> list[Demonstration]:
    """Solve the training problems.

    Args:
        suite: whose training problems ask for the value of an expression.
        direct: share of problems that are answered at once, without the tool.
        seed: of the choice.

    Raises:
        ValueError: a problem is of a kind that cannot be demonstrated.
    """
    random = np.random.default_rng(stream_seed("math demonstrations", seed))
    made = []
    for task in suite.tasks("train"):
        problem, _ = suite.pose(task.id)
        if problem.kind not in _KINDS:
            raise ValueError(
                f"environment: problems to demonstrate must be of the kinds {' and '.join(_KINDS)}, whose questions "
                f"are an expression to compute, not {problem.kind or 'without a kind'}"
            )
        expression = max(_EXPRESSION.findall(problem.question), key=len)
        call = {"name": CODE_INTERPRETER.name, "arguments": {"code": f"print({expression})"}}
        answer = f"\\boxed{{{problem.answer}}}"
        at_once = suite.tool is None or random.random() < direct
        replies = (answer,) if at_once else (f"{CALL_TAGS[0]}{json.dumps(call)}{CALL_TAGS[1]}", answer)
        question = "\n\n".join(part for part in (problem.question, suite.instruction) if part)
        made.append(Demonstration(question, replies, problem.answer))
    return made


def encode(demonstration: Demonstration, agent: ChatToolAgent) -> TokenRow:
    """The token row that the policy's own context would be, had it solved the problem this way.

    Args:
        demonstration: to encode.
        agent: bound to the tokenizer; the one that will play with the policy.
    """
    end = agent.format.end
    pieces = [(agent.opening("", demonstration.question).ids, False)]
    for number, reply in enumerate(demonstration.replies):
        ids = agent.encode(reply + end)
        pieces.append((ids, True))
        if number + 1 < len(demonstration.replies):
            result = write_results([(CODE_INTERPRETER.name, demonstration.result)])
            pieces.append((agent.continuation_ids(ids, result), False))
    return TokenRow(
        np.concatenate([ids for ids, _ in pieces]).astype(np.int32),
        np.concatenate([np.full(len(ids), learned) for ids, learned in pieces]),
    )


def warmstart_math(
    environment: MathProblems,
    agent: ChatToolAgent,
    output: str,
    model: dict[str, Any],
    direct: float = 0.5,
    vocabulary: int = 512,
    optimization: Optimization = Optimization(),  # noqa: B008 - frozen
    held_out: HeldOut = HeldOut(max_turns=4, max_response_tokens=64),  # noqa: B008 - frozen
    workers: int = 1,
    threads: int = 1,
    seed: int = 0,
) -> list[Score]:
    """Clone written solutions into a fresh model and write a Hugging Face folder.

    Args:
        environment: its training problems are demonstrated, its validation problems show the result. They must be
            others than those of the reinforcement learning that follows (give their sources seeds of their own).
        agent: that will play with the policy.
        output: folder to write.
        model: Hugging Face configuration of the fresh model: ``model_type`` and that type's own keys.
        direct: share of problems that are answered at once, without the tool.
        vocabulary: size of the tokenizer's, at least 300.
        optimization: how the model is fitted.
        held_out: how the result is measured.
        workers: processes that play.
        threads: of torch in this process.
        seed: of everything random.

    Returns:
        What the policy scores.

    Raises:
        ValueError: settings or data cannot be used; the message names the key and the fix.
    """
    if not 0 <= direct <= 1:
        raise ValueError(f"direct must be in [0, 1], not {direct}")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {output} exists and is not a folder.")
    torch.set_num_threads(threads)
    environment.prepare()
    demonstrations = demonstrate(environment, direct, seed)
    tokenizer = build_chat_tokenizer(_texts(demonstrations), vocabulary)
    network = fresh_model(model, tokenizer, "model", dtype=torch.float32, attention="sdpa", seed=seed)
    agent.bind(tokenizer)
    rows = [encode(demonstration, agent) for demonstration in demonstrations]
    apart = rows[::_VALIDATION]
    train = [row for number, row in enumerate(rows) if number % _VALIDATION]
    if not train:
        raise ValueError(f"environment: {len(rows)} training problems are too few to learn from")
    fit_rows(network, train, apart, optimization, seed)
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return evaluate(environment, folder, held_out, workers=workers, seed=seed, agent=agent)


def _texts(demonstrations: Sequence[Demonstration]) -> list[str]:
    return [text for item in demonstrations for text in (item.question, *item.replies)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: every argument of :func:`warmstart_math` is a key of the YAML file and an option.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    scores = run_command(
        warmstart_math, "spear warmstart-math", "Clone written solutions into a small policy to start from.", arguments
    )
    console = Console()
    for score in scores:
        console.print(str(score))

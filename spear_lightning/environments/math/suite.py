"""The mathematics task suite: which problems there are, how answers are graded, and what runs the model's programs."""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from spear_lightning.environments.base import Split, Task, TaskSuite
from spear_lightning.environments.math.environment import Interpreter, MathEnv
from spear_lightning.environments.math.generated import GeneratedProblems
from spear_lightning.environments.math.graders import Grader, MathVerify, OwnScorer
from spear_lightning.environments.math.problems import Problem, ProblemSource
from spear_lightning.utils.ranges import Above0, Positive, in_range

if TYPE_CHECKING:
    from spear_lightning.sandbox import Sandbox

logger = logging.getLogger(__name__)

_INSTRUCTION = "Think step by step, then put your final answer within \\boxed{}."
_SEEDS_PER_SPLIT = 1_000_000


@in_range
class MathProblems(TaskSuite):
    r"""Mathematics problems with verifiable answers, with or without a code interpreter.

    A training problem whose question is also asked in validation or test is left out. A split of several sources
    (``ProblemSets``) is reported source by source.

    Args:
        train: training problems; default 480 generated ones, from seed 0 on.
        validation: default 96 generated problems, from seed 1 000 000 on.
        test: default 192 generated problems, from seed 2 000 000 on.
        grader: of final answers; default the scorers of reasoning-gym for generated problems, ``MathVerify`` for
            others.
        tool: ``code_interpreter``, or ``None`` to train without one.
        sandbox: what runs the model's programs: a name that
            ``spear_lightning.sandbox.open_sandbox`` knows (``auto`` takes what this machine has),
            or the import path of a function that makes a sandbox.
        sandbox_args: of that function (``{limits: {wall_seconds: 10}}``).
        instruction: put after each question; may be empty.
        max_turns: messages of an episode.
        output_characters: a longer output of a program is cut in its middle.
        code_seconds: programs of one message that are not begun after so many seconds are not run. Together with the
            time limit of one program it must stay below ``data.step_timeout``.

    Raises:
        ValueError: an argument cannot be used; the message names it.

    Example::

        environment:
          class_path: MathProblems
          init_args:
            train:
              class_path: ProblemFile
              init_args: {path: dapo.parquet, columns: {question: prompt, answer: reward_model.ground_truth}}
            grader: {class_path: MathVerify, init_args: {seconds: 5}}
    """

    def __init__(
        self,
        train: ProblemSource | None = None,
        validation: ProblemSource | None = None,
        test: ProblemSource | None = None,
        grader: Grader | None = None,
        tool: Literal["code_interpreter"] | None = "code_interpreter",
        sandbox: str = "auto",
        sandbox_args: Mapping[str, Any] | None = None,
        instruction: str = _INSTRUCTION,
        max_turns: Positive = 8,
        output_characters: Positive = 4000,
        code_seconds: Above0 = 20.0,
    ) -> None:
        generated = {"train": 480, "validation": 96, "test": 192}
        given = {"train": train, "validation": validation, "test": test}
        self.sources: dict[str, ProblemSource] = {
            split: given[split] or GeneratedProblems(count=count, seed=number * _SEEDS_PER_SPLIT)
            for number, (split, count) in enumerate(generated.items())
        }
        _check_seeds(self.sources)
        self.grader, self.tool = grader, tool
        self._verifier = MathVerify()  # with a process of its own, for all environments of this one
        self.sandbox, self.sandbox_args = sandbox, dict(sandbox_args or {})
        self.instruction, self.max_turns = instruction, max_turns
        self.output_characters, self.code_seconds = output_characters, code_seconds

    def prepare(self) -> None:
        """Read all problems and see to it that they can be graded.

        Raises:
            ValueError: data, packages or settings cannot be used; the message says which and what to do.
        """
        for split, source in self.sources.items():
            source.problems()
            self._grader(split).check(source)

    def tasks(self, split: Split) -> Sequence[Task]:
        """One task per problem.

        Raises:
            ValueError: the problems cannot be read, or none is left; the message names the source.
        """
        problems = self.sources[split].problems()
        held_out: set[str] = set()
        if split == "train":
            held_out = {p.question for name in ("validation", "test") for p in self.sources[name].problems()}
        kept = tuple(
            Task(id=f"{split}-{number}", task_type=problem.task_type)
            for number, problem in enumerate(problems)
            if problem.question not in held_out
        )
        left_out = len(problems) - len(kept)
        if left_out:
            logger.info("%d of %d training problems are held out as well and left out", left_out, len(problems))
        if not kept:
            raise ValueError(
                f"{split}: {self.sources[split]} has no problem that is not also asked in validation or test"
            )
        return kept

    def make(self) -> MathEnv:
        """A fresh environment. The environments of a process share the problems, the graders and the sandbox.

        Raises:
            ValueError: ``sandbox`` cannot be found.
            Exception: what the sandbox says where it does not work: without one, nothing a model wrote is run.
        """
        interpreter = None if self.tool is None else self._interpreter
        return MathEnv(self.pose, interpreter, self.instruction, self.max_turns, self.code_seconds)

    @cached_property
    def _interpreter(self) -> Interpreter:
        interpreter = Interpreter(_opener(self.sandbox, self.sandbox_args), self.output_characters)
        interpreter.open()
        atexit.register(interpreter.close)
        return interpreter

    def pose(self, task: str) -> tuple[Problem, Grader]:
        """The problem of a task id, and what grades it.

        Raises:
            ValueError: there is no such task.
        """
        split, _, number = task.rpartition("-")
        if split not in self.sources or not number.isdecimal():
            raise ValueError(f"there is no task {task!r}; tasks are called train-0, validation-0, test-0 and so on")
        problems = self.sources[split].problems()
        if int(number) >= len(problems):
            raise ValueError(f"there is no task {task!r}: {self.sources[split]} has {len(problems)} problems")
        return problems[int(number)], self._grader(split)

    def _grader(self, split: str) -> Grader:
        generated = all(isinstance(part, GeneratedProblems) for part in self.sources[split].parts)
        return self.grader or (OwnScorer() if generated else self._verifier)


def _check_seeds(sources: Mapping[str, ProblemSource]) -> None:
    """See to it that no two sources generate the same problems."""
    parts = [(split, part) for split, source in sources.items() for part in source.parts]
    for (first, one), (second, other) in combinations(parts, 2):
        if not isinstance(one, GeneratedProblems) or not isinstance(other, GeneratedProblems):
            continue
        apart = one.seed + one.count <= other.seed or other.seed + other.count <= one.seed
        if set(one.kinds) & set(other.kinds) and not apart:
            raise ValueError(f"{first} ({one}) and {second} ({other}) overlap: move a seed, or ask for fewer problems")


def _opener(name: str, arguments: Mapping[str, Any]) -> Callable[[], Sandbox]:
    """A function that opens the sandbox ``name``: one of ours, or an import path."""
    module, _, function = name.rpartition(".")
    try:
        if not module:
            ours = importlib.import_module("spear_lightning.sandbox")
            limits = {"limits": ours.SandboxLimits(**arguments["limits"])} if arguments.get("limits") else {}
            return functools.partial(ours.open_sandbox, name, **{**arguments, **limits})
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"sandbox: cannot import {name!r}: {error}") from error
    except TypeError as error:
        raise ValueError(f"sandbox_args: {error}") from error
    return functools.partial(found, **arguments)

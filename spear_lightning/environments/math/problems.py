"""What a mathematics problem is, and where problems come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from typing_extensions import override

from spear_lightning.environments.base import Settings


@dataclass(frozen=True)
class Problem:
    """A question with an answer.

    Attributes:
        question: what is asked.
        answer: the reference answer, as text.
        task_type: type that results are broken down by, may be empty.
        scorer: of its source's own, from an answer to a score in [0, 1]; ``None`` where the source has none.
    """

    question: str
    answer: str
    task_type: str = ""
    scorer: Callable[[str], float] | None = None


@dataclass(frozen=True)
class Columns:
    """Which fields of a record hold what; a name with dots goes into nested records (``reward_model.ground_truth``).

    Args:
        question: text, or a list of chat messages, whose texts are joined.
        answer: text or a whole number.
        task_type: type that results are broken down by; empty takes none.
        remove: pieces of text that are taken out of every question (the instructions of the data set, where they
            contradict those of the environment).
    """

    question: str = "question"
    answer: str = "answer"
    task_type: str = ""
    remove: list[str] = field(default_factory=list)

    @property
    def top_level(self) -> list[str]:
        """The columns that are needed at all."""
        names = [self.question, self.answer, *([self.task_type] if self.task_type else [])]
        return list(dict.fromkeys(name.partition(".")[0] for name in names))

    def problem(self, record: Mapping[str, Any], place: str) -> Problem:
        """The problem in a record.

        Args:
            record: one row.
            place: where it stands, for messages (``file.jsonl, line 3``).

        Raises:
            ValueError: a field is missing or not text; the message names place, field and what there is.
        """
        question = _text_of_chat(_field(record, self.question, place), f"{place}: {self.question}")
        for piece in self.remove:
            question = question.replace(piece, "")
        question = question.strip()
        if not question:
            raise ValueError(f"{place}: {self.question} is empty")
        answer = _field(record, self.answer, place)
        if isinstance(answer, int) and not isinstance(answer, bool):
            answer = str(answer)  # exact, and what the answers of competitions are
        if not isinstance(answer, str) or not answer.strip():
            shown = "empty" if isinstance(answer, str) else f"{type(answer).__name__}, neither text nor a whole number"
            raise ValueError(f"{place}: the answer ({self.answer}) is {shown}")
        task_type = str(_field(record, self.task_type, place)) if self.task_type else ""
        return Problem(question, answer.strip(), task_type)


def _field(record: Mapping[str, Any], name: str, place: str) -> Any:
    value: Any = record
    path = ""
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            there = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            where = f" in {path}" if path else ""
            raise ValueError(f"{place}: there is no column {part!r}{where} (wanted: {name}); there is: {there}")
        value = value[part]
        path = f"{path}.{part}" if path else part
    return value


def _text_of_chat(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise ValueError(f"{place} is a {type(value).__name__}, neither text nor a list of chat messages")
    texts = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"{place}: a chat message must have a role and a content that is text")
        if message.get("role") not in ("system", "user"):
            raise ValueError(f"{place}: a prompt has messages of system and user, not of {message.get('role')!r}")
        texts.append(message["content"])
    return "\n\n".join(texts)


class ProblemSource(Settings, ABC):
    """Problems in a fixed order. Cheap to make and to pickle: what is large is read at the first use."""

    def problems(self) -> Sequence[Problem]:
        """All problems; equal settings (and data) give the same ones in the same order, in any process.

        Raises:
            ValueError: the data cannot be used; the message names file, line or setting and the fix.
        """
        return self._problems

    @cached_property
    def _problems(self) -> tuple[Problem, ...]:
        return tuple(self._read())

    @abstractmethod
    def _read(self) -> Iterable[Problem]:
        """The problems, in order."""

    @abstractmethod
    def __str__(self) -> str:
        """What the problems are read from, for messages."""

    @property
    def parts(self) -> Sequence[ProblemSource]:
        """The sources that it consists of; itself, where it is one."""
        return (self,)


class ProblemSets(ProblemSource):
    """Several sources one after the other, whose results are reported apart, by task type.

    Args:
        sources: by a name of your own, without ``/``. The type of a problem is the name of its source, and below it
            the type that the source gives it, if any (``aime24``, ``generated/gcd``).

    Raises:
        ValueError: no source, or a name that cannot be one.

    Example::

        validation:
          class_path: ProblemSets
          init_args:
            sources:
              aime24: {class_path: ProblemFile, init_args: {path: aime24.jsonl}}
              aime25: {class_path: ProblemFile, init_args: {path: aime25.jsonl}}
    """

    def __init__(self, sources: dict[str, ProblemSource]) -> None:
        if not sources:
            raise ValueError("ProblemSets.sources is empty: name at least one source")
        wrong = [name for name in sources if not name or "/" in name]
        if wrong:
            raise ValueError(f"ProblemSets.sources: {wrong[0]!r} cannot be a name: it must be a word without /")
        self.sources = dict(sources)

    @override
    def __str__(self) -> str:
        return ", ".join(map(str, self.sources.values()))

    @override
    def _read(self) -> Iterable[Problem]:
        for name, source in self.sources.items():
            for problem in source.problems():
                yield replace(problem, task_type=f"{name}/{problem.task_type}".rstrip("/"))

    @property
    @override
    def parts(self) -> Sequence[ProblemSource]:
        return [part for source in self.sources.values() for part in source.parts]

"""Problems from JSONL and Parquet files and from Hugging Face data sets."""

from __future__ import annotations

import importlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from spear_lightning.environments.math.problems import Columns, Problem, ProblemSource
from spear_lightning.utils.ranges import Positive, in_range

_BATCH_ROWS = 4096


class _Records(ProblemSource):
    """Problems made of records; of equal questions only the first one is kept."""

    def __init__(self, columns: Columns, limit: Positive | None) -> None:
        self.columns, self.limit = columns, limit

    @override
    def _read(self) -> Iterable[Problem]:
        found: dict[str, Problem] = {}
        for record, place in self.records():
            if self.limit is not None and len(found) >= self.limit:
                break
            problem = self.columns.problem(record, place)
            found.setdefault(problem.question, problem)
        if not found:
            raise ValueError(f"{self} has no problem in it")
        return found.values()

    @abstractmethod
    def records(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Rows with the place where each stands."""


@in_range
class ProblemFile(_Records):
    """Problems in a JSONL (``.jsonl``) or Parquet (``.parquet``) file.

    Args:
        path: of the file.
        columns: which fields hold what.
        limit: only the first so many different problems; ``None`` takes all.

    Raises:
        ValueError: the ending of the file is not known, or ``limit`` is not positive.

    Example::

        train:
          class_path: ProblemFile
          init_args:
            path: data/dapo-math-17k.parquet
            columns: {question: prompt, answer: reward_model.ground_truth}
    """

    def __init__(self, path: str, columns: Columns = Columns(), limit: Positive | None = None) -> None:  # noqa: B008 - frozen
        super().__init__(columns, limit)
        self.path = Path(path).expanduser()
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"path: {path} must end in .jsonl or .parquet")

    @override
    def __str__(self) -> str:
        return str(self.path)

    @override
    def records(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Rows with the place where each stands.

        Raises:
            ValueError: the file is missing or broken; the message names the line, or the columns that there are.
        """
        if not self.path.is_file():
            raise ValueError(f"path: there is no file {self.path}")
        return self._parquet() if self.path.suffix == ".parquet" else self._lines()

    def _lines(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{self.path}, line {number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{place}: not valid JSON: {error}") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{place}: a {type(record).__name__}, not a JSON object")
                yield record, place

    def _parquet(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise ValueError(f"{self.path}: reading Parquet files needs pyarrow: pip install pyarrow") from error
        try:
            with parquet.ParquetFile(self.path) as file:
                names = list(file.schema_arrow.names)
                missing = [name for name in self.columns.top_level if name not in names]
                if missing:
                    raise ValueError(f"{self.path}: no column {missing[0]!r}; there is: {', '.join(names)}")
                row = 0
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=self.columns.top_level):
                    for record in batch.to_pylist():
                        row += 1
                        yield record, f"{self.path}, row {row}"
        except (OSError, importlib.import_module("pyarrow").ArrowException) as error:
            raise ValueError(f"{self.path} is not a readable Parquet file: {error}") from error


@in_range
class HuggingFaceProblems(_Records):
    """Problems in a data set of the Hugging Face hub, or in a folder that ``datasets`` can load.

    Args:
        name: of the data set (``BytedTsinghua-SIA/DAPO-Math-17k``) or a folder.
        split: of the data set, in its own words.
        config: of the data set, where it has several.
        revision: branch, tag or commit; name one, so that a run can be repeated.
        columns: which fields hold what.
        limit: only the first so many different problems; ``None`` takes all.

    Raises:
        ValueError: ``limit`` is not positive.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        limit: Positive | None = None,
    ) -> None:
        super().__init__(columns, limit)
        self.name, self.split, self.config, self.revision = name, split, config, revision

    @override
    def __str__(self) -> str:
        return f"the data set {self.name} ({self.split})"

    def records(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Rows with the place where each stands.

        Raises:
            ValueError: ``datasets`` is not installed, or cannot load this one.
        """
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise ValueError(
                f"{self} needs the package datasets: pip install datasets, or save the data as JSONL or Parquet and "
                "use ProblemFile"
            ) from error
        try:
            rows = datasets.load_dataset(self.name, self.config, split=self.split, revision=self.revision)
        except Exception as error:  # whatever hub, cache and file readers raise
            raise ValueError(f"{self} cannot be loaded: {error}") from error
        for number, record in enumerate(rows):
            yield record, f"{self}, row {number}"

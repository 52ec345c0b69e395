"""Problems made by reasoning-gym: no download, equal for equal seeds."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from typing_extensions import override

from spear_lightning.environments.math.problems import Problem, ProblemSource
from spear_lightning.utils.ranges import NotNegative, Positive, in_range

KINDS = ("chain_sum", "products", "gcd", "lcm", "simple_equations", "count_primes", "gsm_symbolic")

# reasoning-gym scores some kinds by handing the answer to eval() or sympy.parse_expr, which runs what a model wrote.
# These were read (0.1.25) and only compare text or numbers.
SAFE_SCORERS = frozenset(
    (*KINDS, "count_bits", "decimal_arithmetic", "decimal_chain_sum", "fraction_simplification", "leg_counting")
)


@in_range
class GeneratedProblems(ProblemSource):
    """Procedural problems of `reasoning-gym`, the kinds taking turns.

    Args:
        kinds: names of its data sets.
        count: number of problems. Equal questions are dropped, so there may be fewer.
        seed: of the first problem; problem ``i`` has the seed ``seed + i``.
        settings: by kind, arguments of that data set (``{chain_sum: {max_terms: 2, max_digits: 2}}``).

    Raises:
        ValueError: a number is out of range, or a setting is for a kind that is not played.
    """

    def __init__(
        self,
        kinds: Sequence[str] = KINDS,
        count: Positive = 480,
        seed: NotNegative = 0,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"kinds must name data sets of reasoning-gym, each once; got {list(kinds)}")
        unknown = sorted(set(settings or {}) - set(kinds))
        if unknown:
            raise ValueError(f"settings: {unknown[0]} is not among the kinds {', '.join(kinds)}")
        self.kinds, self.count, self.seed = tuple(kinds), count, seed
        self.settings = {kind: dict(values) for kind, values in (settings or {}).items()}

    @override
    def __str__(self) -> str:
        return f"reasoning-gym, seeds {self.seed} to {self.seed + self.count - 1}"

    @override
    def _read(self) -> Iterable[Problem]:
        sets = [self._data_set(kind) for kind in self.kinds]  # an item takes 0.01 to 5 ms
        found: dict[str, Problem] = {}
        for number in range(self.count):
            turn = number % len(sets)
            entry = sets[turn][number]
            scorer = functools.partial(sets[turn].score_answer, entry=entry)
            own = scorer if self.kinds[turn] in SAFE_SCORERS else None
            problem = Problem(str(entry["question"]), str(entry["answer"]), self.kinds[turn], own)
            found.setdefault(problem.question, problem)
        return found.values()

    def _data_set(self, kind: str) -> Any:
        try:
            gym = importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise ValueError("generated problems need reasoning-gym: pip install 'spear-lightning[math]'") from error
        if kind not in gym.factory.DATASETS:
            raise ValueError(f"kinds: reasoning-gym has no data set {kind!r}; it has {', '.join(gym.factory.DATASETS)}")
        try:
            # Item i of a data set is drawn from the seed `seed + i`.
            return gym.create_dataset(kind, seed=self.seed, size=self.count, **self.settings.get(kind, {}))
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"settings.{kind}: reasoning-gym refuses them: {error}") from error

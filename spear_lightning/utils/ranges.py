"""Numbers with a range: said in the signature, refused where an object is made.

>>> from dataclasses import dataclass
>>> @in_range
... @dataclass(frozen=True)
... class Rollouts:
...     tasks: Positive = 8
>>> Rollouts(tasks=0)
Traceback (most recent call last):
ValueError: Rollouts.tasks must be at least 1, not 0
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

_Class = TypeVar("_Class", bound=type)

Positive = Annotated[int, Ge(1)]
"""A whole number of at least 1."""

NotNegative = Annotated[int, Ge(0)]
"""A whole number of at least 0."""

Above0 = Annotated[float, Gt(0)]
"""A number above 0."""

AtLeast0 = Annotated[float, Ge(0)]
"""A number of at least 0."""

Share = Annotated[float, Gt(0), Le(1)]
"""A number in (0, 1]."""

Fraction = Annotated[float, Ge(0), Le(1)]
"""A number in [0, 1]."""

Confidence = Annotated[float, Gt(0), Lt(1)]
"""A number in (0, 1)."""

_WORDS: dict[type, tuple[str, str, Callable[[float, float], bool]]] = {
    Ge: ("ge", "at least", lambda value, bound: value >= bound),
    Gt: ("gt", "above", lambda value, bound: value > bound),
    Le: ("le", "at most", lambda value, bound: value <= bound),
    Lt: ("lt", "below", lambda value, bound: value < bound),
}


def in_range(cls: _Class) -> _Class:
    """Class decorator: arguments must keep the range of their annotation (:data:`Positive`, also ``Positive | None``).

    Raises:
        ValueError: by the class, when it is made with a number out of range; names class, argument and range.
    """
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        for name, bounds in _bounds_of(init).items():
            value = given.get(name)
            if value is not None and not all(_WORDS[type(bound)][2](value, _limit(bound)) for bound in bounds):
                said = " and ".join(f"{_WORDS[type(bound)][1]} {_limit(bound):g}" for bound in bounds)
                raise ValueError(f"{cls.__name__}.{name} must be {said}, not {value}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _limit(bound: Any) -> float:
    return float(getattr(bound, _WORDS[type(bound)][0]))


@functools.cache
def _bounds_of(init: Callable[..., None]) -> dict[str, tuple[Any, ...]]:
    """Of each argument that has a range. Looked up late: annotations may name what is defined after the class."""
    hints = get_type_hints(init, include_extras=True)
    found = {name: tuple(_bounds(hint)) for name, hint in hints.items()}
    return {name: bounds for name, bounds in found.items() if bounds}


def _bounds(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Annotated:
        yield from (extra for extra in get_args(hint)[1:] if type(extra) in _WORDS)
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            yield from _bounds(option)

"""Arguments with a range, or of a few literals: said in the signature, refused where an object is made.

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
import numbers
import operator
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
    Ge: ("ge", "at least", operator.ge),
    Gt: ("gt", "above", operator.gt),
    Le: ("le", "at most", operator.le),
    Lt: ("lt", "below", operator.lt),
}


def in_range(cls: _Class) -> _Class:
    """Class decorator: arguments must keep the range, or be one of the literals, of their annotation.

    Unions are allowed: ``Positive | None``, ``Literal["auto"] | Above0``.

    Raises:
        ValueError: by the class, when it is made with another value; names class, argument and range.
    """
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        hints = _hints_of(init)
        for name, value in signature.bind(self, *args, **kwargs).arguments.items():
            if name in hints and (rule := _broken_rule(hints[name], value)):
                raise ValueError(f"{cls.__name__}.{name} must be {rule}, not {value}")
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@functools.cache
def _hints_of(init: Callable[..., None]) -> dict[str, Any]:
    """Annotations with their extras. Looked up late: they may name what is defined after the class."""
    found: dict[str, Any] = {}
    for name, annotation in init.__annotations__.items():
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        with suppress(NameError):  # imported for the type checker alone: no range
            found |= get_type_hints(alone, init.__globals__, include_extras=True)
    return found


def _broken_rule(hint: Any, value: object) -> str:
    """What a value must be by an annotation; empty if it is, or if the annotation says nothing of its range."""
    rules = []
    for option in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if option is types.NoneType:
            if value is None:
                return ""
            continue
        bounds = [extra for extra in getattr(option, "__metadata__", ()) if type(extra) in _WORDS]
        if get_origin(option) is Literal:
            allowed, rule = value in get_args(option), f"one of {', '.join(map(str, get_args(option)))}"
        else:
            allowed = isinstance(value, numbers.Real) and all(_within(value, bound) for bound in bounds)
            rule = " and ".join(f"{_WORDS[type(bound)][1]} {_limit(bound):g}" for bound in bounds)
        if allowed or not rule:  # without a rule anything is right
            return ""
        rules.append(rule)
    return " or ".join(rules)


def _within(value: Any, bound: Any) -> bool:
    return _WORDS[type(bound)][2](value, _limit(bound))


def _limit(bound: Any) -> float:
    return float(getattr(bound, _WORDS[type(bound)][0]))

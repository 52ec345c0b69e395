"""Numbers out of the range that a signature says are refused, in whatever way they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from spear_lightning.utils.ranges import Above0, Positive, Share, in_range


@in_range
@dataclass(frozen=True)
class Numbers:
    """Some numbers.

    Args:
        count: of things.
        share: of a whole.
        mode: of work.
        limit: of something.
    """

    count: Positive = 1
    share: Share | None = None
    mode: Literal["slow", "fast"] = "slow"
    limit: Literal["auto"] | Above0 = "auto"


@in_range
class Plain:
    """A class with an ordinary constructor.

    Args:
        numbers: of it.
        count: of things.
    """

    def __init__(self, numbers: Numbers = Numbers(), count: Positive = 1) -> None:
        self.numbers, self.count = numbers, count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "Numbers.count must be at least 1, not 0"),
        ({"share": 0.0}, "Numbers.share must be above 0 and at most 1, not 0.0"),
        ({"share": 1.5}, "Numbers.share must be above 0 and at most 1, not 1.5"),
        ({"mode": "lazy"}, "Numbers.mode must be one of slow, fast, not lazy"),
        ({"limit": "none"}, "Numbers.limit must be one of auto or above 0, not none"),
        ({"limit": 0.0}, "Numbers.limit must be one of auto or above 0, not 0.0"),
        ({"share": float("nan")}, "Numbers.share must be above 0 and at most 1, not nan"),
    ],
)
def test_a_number_out_of_range_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Numbers(**arguments)  # type: ignore[arg-type]


def test_numbers_in_range_and_none_are_taken_by_name_and_by_position() -> None:
    assert Numbers() == Numbers(1, None)
    assert Numbers(3, share=1.0) == Numbers(count=3, share=1.0)
    assert Numbers(1, None, "fast", 0.5).limit == 0.5
    with pytest.raises(ValueError, match=r"^Plain.count must be at least 1, not -1$"):
        Plain(Numbers(), -1)


def test_a_configuration_reaches_the_check() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Plain, "plain")
    plain = parser.instantiate(parser.parse_args(["--plain=Plain", "--plain.numbers.count=4", "--plain.count=2"])).plain
    assert (plain.numbers.count, plain.count) == (4, 2)
    given = parser.parse_args(["--plain=Plain", "--plain.numbers.count=0"])
    with pytest.raises(ValueError, match=r"Numbers.count must be at least 1, not 0"):
        parser.instantiate(given)

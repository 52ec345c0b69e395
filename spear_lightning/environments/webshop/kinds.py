"""The kinds of products of a generated catalogue: their names, what can be said of them, what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spear_lightning.utils.package_data import read_yaml


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of product.

    Attributes:
        noun: what it is called.
        category: department.
        path: categories, from the department down.
        cost: lowest and highest price in dollars.
        shared: attributes that can hold for one, as for other kinds.
        own: attributes that can hold for this kind only.
        options: values that an option can have, by name.
    """

    noun: str
    category: str
    path: Sequence[str]
    cost: tuple[float, float]
    shared: Sequence[str]
    own: Sequence[str]
    options: Mapping[str, Sequence[str]]

    @property
    def attributes(self) -> list[str]:
        """All that can hold for one."""
        return [*self.shared, *self.own]


KINDS: tuple[Kind, ...] = tuple(Kind(**row) for row in read_yaml(__name__, "kinds.yaml")["kinds"])
"""They take turns in a catalogue."""

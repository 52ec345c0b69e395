"""What a generated scene may hold: the rooms of the ALFRED simulator, their furniture and their portable objects.

Which object fits where, what can be heated or cleaned, and which rooms suit a task is not decided here: that comes from
the tables that the ``alfworld`` package ships (``alfworld.gen.constants``).
"""

from __future__ import annotations

from dataclasses import dataclass

from spear_lightning.utils.package_data import read_yaml


@dataclass(frozen=True, slots=True)
class Room:
    """A kind of room.

    Attributes:
        receptacles: receptacle type to the largest number of them in one room.
        objects: object types that may lie about.
    """

    receptacles: dict[str, int]
    objects: list[str]


_DATA = read_yaml(__name__, "rooms.yaml")
TASK_TYPES: tuple[str, ...] = tuple(_DATA["task_types"])
"""ALFWorld's six task types, in the order of the package's task numbers 1 to 6."""
LAMPS: tuple[str, ...] = tuple(_DATA["lamps"])
LAMP_STANDS: tuple[str, ...] = tuple(_DATA["lamp_stands"])
"""Where a lamp may stand in a generated scene."""
ROOMS = {name: Room(**room) for name, room in _DATA["rooms"].items()}

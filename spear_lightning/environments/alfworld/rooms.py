"""What a generated scene may hold: the rooms of the ALFRED simulator, their furniture and their portable objects.

Which object fits where, what can be heated or cleaned, and which rooms suit a task is not decided here: that comes from
the tables that the ``alfworld`` package ships (``alfworld.gen.constants``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TASK_TYPES: tuple[str, ...] = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
"""ALFWorld's six task types, in the order of the package's task numbers 1 to 6."""


@dataclass(frozen=True, slots=True)
class Room:
    """A kind of room.

    Attributes:
        receptacles: receptacle type to the largest number of them in one room.
        objects: object types that may lie about.
    """

    receptacles: dict[str, int]
    objects: tuple[str, ...]


# Room | receptacles, with the largest number of each where it is not 1 | objects
_TABLE = """
Kitchen
  | Cabinet 9, CoffeeMachine, CounterTop 3, DiningTable, Drawer 6, Fridge, GarbageCan, Microwave, Shelf 3,
    SinkBasin, StoveBurner 4, Toaster
  | Apple, Bowl, Bread, ButterKnife, Cup, DishSponge, Egg, Fork, Glassbottle, Kettle, Knife, Ladle, Lettuce,
    Mug, Pan, PepperShaker, Plate, Pot, Potato, SaltShaker, SoapBottle, Spatula, Spoon, Tomato, WineBottle
LivingRoom
  | ArmChair 2, Cabinet 3, CoffeeTable 2, Drawer 4, Dresser, GarbageCan, Shelf 4, SideTable 3, Sofa 2, TVStand
  | Book, Box, CellPhone, CreditCard, KeyChain, Laptop, Newspaper, Pillow, RemoteControl, Statue, TissueBox,
    Vase, Watch
Bedroom
  | ArmChair, Bed, Desk 2, Drawer 6, Dresser, GarbageCan, LaundryHamper, Safe, Shelf 5, SideTable 2
  | AlarmClock, BaseballBat, BasketBall, Book, Bowl, CD, CellPhone, Cloth, CreditCard, KeyChain, Laptop, Mug,
    Pen, Pencil, Pillow, TeddyBear, TennisRacket, Vase
Bathroom
  | BathtubBasin, Cabinet 5, CounterTop 2, Drawer 3, GarbageCan, HandTowelHolder 2, Shelf 2, SinkBasin 2,
    Toilet, ToiletPaperHanger, TowelHolder 2
  | Candle, Cloth, DishSponge, HandTowel, Plunger, ScrubBrush, SoapBar, SoapBottle, SprayBottle, TissueBox,
    ToiletPaper, ToiletPaperRoll, Towel
"""


def _read(row: str) -> tuple[str, Room]:
    name, receptacles, objects = (" ".join(cell.split()) for cell in row.split("|"))
    counts = (entry.partition(" ") for entry in receptacles.split(", "))
    return name, Room({receptacle: int(most or 1) for receptacle, _, most in counts}, tuple(objects.split(", ")))


ROOMS: dict[str, Room] = dict(map(_read, re.split(r"\n(?=\S)", _TABLE.strip())))

LAMPS: tuple[str, ...] = ("DeskLamp", "FloorLamp")
LAMP_STANDS: tuple[str, ...] = ("CoffeeTable", "Desk", "Dresser", "Shelf", "SideTable", "TVStand")
"""Where a lamp may stand in a generated scene."""

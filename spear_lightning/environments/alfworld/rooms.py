"""What a generated scene may hold: the rooms of the ALFRED simulator, their furniture and their portable objects.

Which object fits where, what can be heated or cleaned, and which rooms suit a task is not decided here: that comes from
the tables that the ``alfworld`` package ships (``alfworld.gen.constants``).
"""

from __future__ import annotations

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


ROOMS: dict[str, Room] = {
    "Kitchen": Room(
        receptacles={
            "Cabinet": 9,
            "CoffeeMachine": 1,
            "CounterTop": 3,
            "DiningTable": 1,
            "Drawer": 6,
            "Fridge": 1,
            "GarbageCan": 1,
            "Microwave": 1,
            "Shelf": 3,
            "SinkBasin": 1,
            "StoveBurner": 4,
            "Toaster": 1,
        },
        objects=(
            *("Apple", "Bowl", "Bread", "ButterKnife", "Cup", "DishSponge", "Egg", "Fork", "Glassbottle", "Kettle"),
            *("Knife", "Ladle", "Lettuce", "Mug", "Pan", "PepperShaker", "Plate", "Pot", "Potato", "SaltShaker"),
            *("SoapBottle", "Spatula", "Spoon", "Tomato", "WineBottle"),
        ),
    ),
    "LivingRoom": Room(
        receptacles={
            "ArmChair": 2,
            "Cabinet": 3,
            "CoffeeTable": 2,
            "Drawer": 4,
            "Dresser": 1,
            "GarbageCan": 1,
            "Shelf": 4,
            "SideTable": 3,
            "Sofa": 2,
            "TVStand": 1,
        },
        objects=(
            *("Book", "Box", "CellPhone", "CreditCard", "KeyChain", "Laptop", "Newspaper", "Pillow", "RemoteControl"),
            *("Statue", "TissueBox", "Vase", "Watch"),
        ),
    ),
    "Bedroom": Room(
        receptacles={
            "ArmChair": 1,
            "Bed": 1,
            "Desk": 2,
            "Drawer": 6,
            "Dresser": 1,
            "GarbageCan": 1,
            "LaundryHamper": 1,
            "Safe": 1,
            "Shelf": 5,
            "SideTable": 2,
        },
        objects=(
            *("AlarmClock", "BaseballBat", "BasketBall", "Book", "Bowl", "CD", "CellPhone", "Cloth", "CreditCard"),
            *("KeyChain", "Laptop", "Mug", "Pen", "Pencil", "Pillow", "TeddyBear", "TennisRacket", "Vase"),
        ),
    ),
    "Bathroom": Room(
        receptacles={
            "BathtubBasin": 1,
            "Cabinet": 5,
            "CounterTop": 2,
            "Drawer": 3,
            "GarbageCan": 1,
            "HandTowelHolder": 2,
            "Shelf": 2,
            "SinkBasin": 2,
            "Toilet": 1,
            "ToiletPaperHanger": 1,
            "TowelHolder": 2,
        },
        objects=(
            *("Candle", "Cloth", "DishSponge", "HandTowel", "Plunger", "ScrubBrush", "SoapBar", "SoapBottle"),
            *("SprayBottle", "TissueBox", "ToiletPaper", "ToiletPaperRoll", "Towel"),
        ),
    ),
}

LAMPS: tuple[str, ...] = ("DeskLamp", "FloorLamp")
LAMP_STANDS: tuple[str, ...] = ("CoffeeTable", "Desk", "Dresser", "Shelf", "SideTable", "TVStand")
"""Where a lamp may stand in a generated scene."""

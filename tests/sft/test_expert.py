from __future__ import annotations

import pytest

from spear_lightning.environments.alfworld.expert import Goal, SearchExpert
from spear_lightning.environments.expert import DemonstrationNoise

ROOM = "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a microwave 1, and a shelf 1."


@pytest.mark.parametrize(
    ("task", "goal"),
    [
        ("put some pen on dresser.", Goal("pen", "dresser")),
        ("put a pen in drawer.", Goal("pen", "drawer")),
        ("look at pillow under the desklamp.", Goal("pillow", "desklamp", "light")),
        ("examine the watch with the floorlamp.", Goal("watch", "floorlamp", "light")),
        ("put a clean mug in shelf.", Goal("mug", "shelf", "clean")),
        ("clean some mug and put it in shelf.", Goal("mug", "shelf", "clean")),
        ("put a hot egg in fridge.", Goal("egg", "fridge", "heat")),
        ("heat some egg and put it in fridge.", Goal("egg", "fridge", "heat")),
        ("put a cool apple in microwave.", Goal("apple", "microwave", "cool")),
        ("cool some apple and put it in microwave.", Goal("apple", "microwave", "cool")),
        ("put two book in sofa.", Goal("book", "sofa", count=2)),
        ("find two book and put them in sofa.", Goal("book", "sofa", count=2)),
    ],
)
def test_reads_every_templated_instruction(task: str, goal: Goal) -> None:
    assert Goal.parse(task) == goal


def test_an_instruction_it_cannot_read_is_named() -> None:
    with pytest.raises(ValueError, match="tidy up the kitchen"):
        Goal.parse("tidy up the kitchen")


def test_a_room_without_receptacles_is_refused() -> None:
    with pytest.raises(ValueError, match="no receptacle"):
        SearchExpert(0).reset("put a pen in drawer.", "It is dark.")


def test_plays_from_text_alone() -> None:
    """A whole game against a script: nothing but strings goes in."""
    expert = SearchExpert(0, DemonstrationNoise(shuffle=False))
    expert.reset("heat some mug and put it in cabinet.", ROOM)
    script = [
        ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
        ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see a plate 1."),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("open microwave 1", "You open the microwave 1. The microwave 1 is open. In it, you see nothing."),
        ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a mug 1, and a mug 2."),
        ("take mug 1 from shelf 1", "You pick up the mug 1 from the shelf 1."),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is open. In it, you see nothing."),
        ("heat mug 1 with microwave 1", "You heat the mug 1 using the microwave 1."),
        ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is open. In it, you see a plate 1."),
        ("move mug 1 to cabinet 1", "You move the mug 1 to the cabinet 1."),
    ]
    answer = ""
    for expected, reply in script:
        assert expert.act(answer) == expected
        answer = reply


def test_the_same_seed_strays_in_the_same_way() -> None:
    def opening(seed: int) -> list[str]:
        expert = SearchExpert(seed, DemonstrationNoise(detour=0.4, waste=0.4))
        expert.reset("put a pen in shelf.", ROOM)
        return [expert.act("Nothing happens.") for _ in range(8)]

    assert opening(3) == opening(3)
    assert len({tuple(opening(seed)) for seed in range(5)}) > 1


def test_noise_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"DemonstrationNoise\.waste must be at least 0 and below 1"):
        DemonstrationNoise(waste=1.2)
    with pytest.raises(ValueError, match="sum"):
        DemonstrationNoise(detour=0.5, waste=0.5)

"""Procedural ALFWorld games: the package's own domain, grammar and goal library around a randomly furnished room.

No simulator and no download is needed. A game is drawn from one integer seed and from nothing else, so equal seeds give
equal games on every machine.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from spear_lightning.environments.alfworld.rooms import LAMP_STANDS, LAMPS, ROOMS, TASK_TYPES, Room
from spear_lightning.utils.randomness import stream_seed

# The appliance of each task that changes an object's state, and what the object must admit.
_APPLIANCES: dict[str, tuple[str, str]] = {
    "pick_clean_then_place_in_recep": ("SinkBasin", "Cleanable"),
    "pick_heat_then_place_in_recep": ("Microwave", "Heatable"),
    "pick_cool_then_place_in_recep": ("Fridge", "Coolable"),
}
# Types that the domain's actions name; the translator needs them declared in every problem.
_DOMAIN_RECEPTACLES = ("Fridge", "Microwave", "SinkBasin")
_DOMAIN_OBJECTS = ("ButterKnife", "Knife")
_ATTEMPTS = 500
# ALFRED's identifiers in PDDL's alphabet; `#` stands for the hyphen of PDDL's own syntax until here.
_ESCAPES = str.maketrans({"-": "_minus_", "#": "-", "|": "_bar_", "+": "_plus_", ".": "_dot_", ",": "_comma_"})


@dataclass(frozen=True, slots=True)
class SceneSize:
    """How large generated rooms are. Both ranges include their ends.

    Attributes:
        receptacles: fewest and most receptacles in the room (a task may need up to four, whatever is asked for).
        distractors: fewest and most objects that the task does not need.
    """

    receptacles: tuple[int, int] = (5, 9)
    distractors: tuple[int, int] = (2, 5)

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a range is empty or negative; the message names it.
        """
        for name, (low, high) in (("receptacles", self.receptacles), ("distractors", self.distractors)):
            if not 0 <= low <= high:
                raise ValueError(f"scene.{name} must be [low, high] with 0 <= low <= high, got [{low}, {high}]")


@dataclass(frozen=True, slots=True)
class GeneratedGame:
    """A game as drawn, before the planner has proved it solvable.

    Attributes:
        name: folder name in the official style, ``<task>-<object>-None-<receptacle or lamp>-<scene>``.
        trial: name of the trial folder; unique per seed.
        task_type: task type.
        domain: PDDL domain text.
        grammar: TextWorld grammar with the task's instruction filled in.
        problem: PDDL problem text.
        parameters: the goal's parameters as ``traj_data.json`` lists them.
        instruction: the task in words.
        scene: floor plan number; it only serves as a name.
    """

    name: str
    trial: str
    task_type: str
    domain: str
    grammar: str
    problem: str
    parameters: dict[str, Any]
    instruction: str
    scene: int

    @property
    def entries(self) -> dict[str, Any]:
        """What the engine needs of ``game.tw-pddl``."""
        return {"pddl_domain": self.domain, "grammar": self.grammar, "pddl_problem": self.problem}

    def game_json(self, walkthrough: list[str]) -> str:
        """Text of ``game.tw-pddl``, given the planner's proof that the game can be won."""
        return json.dumps({**self.entries, "solvable": True, "walkthrough": walkthrough})

    def trajectory_json(self) -> str:
        """Text of ``traj_data.json``: the part of ALFRED's trajectory record that ALFWorld reads."""
        return json.dumps(
            {
                "task_id": self.trial,
                "task_type": self.task_type,
                "pddl_params": self.parameters,
                "scene": {"floor_plan": f"FloorPlan{self.scene}", "scene_num": self.scene},
                "turk_annotations": {"anns": [{"task_desc": self.instruction, "high_descs": []}]},
            }
        )


@dataclass
class _Scene:
    """A furnished room under construction; identifiers are ALFRED's ``Type|x|y|z``."""

    rng: random.Random
    receptacles: dict[str, str] = field(default_factory=dict)  # identifier -> type
    objects: dict[str, tuple[str, str]] = field(default_factory=dict)  # identifier -> (type, receptacle identifier)

    def _identifier(self, type_name: str) -> str:
        x, y, z = (self.rng.uniform(low, high) for low, high in ((-4, 4), (0, 2), (-4, 4)))
        return f"{type_name}|{x:+06.2f}|{y:+06.2f}|{z:+06.2f}"

    def furnish(self, type_name: str) -> None:
        # Basins are parts in ALFRED: the engine reads `Sink|x|y|z|SinkBasin` as "sinkbasin".
        if type_name.endswith("Basin"):
            identifier = f"{self._identifier(type_name.removesuffix('Basin'))}|{type_name}"
        else:
            identifier = self._identifier(type_name)
        self.receptacles[identifier] = type_name

    def put(self, type_name: str, places: list[str]) -> None:
        self.objects[self._identifier(type_name)] = (type_name, self.rng.choice(places))

    def of_type(self, *types: str) -> list[str]:
        return [identifier for identifier, type_name in self.receptacles.items() if type_name in types]


@dataclass(frozen=True)
class _Goal:
    """What has to be done: `target` into a receptacle of type `parent`, or under a `lamp`."""

    target: str
    sources: tuple[str, ...]  # receptacle types where the target may lie at the start
    parent: str = ""
    lamp: str = ""
    appliance: str = ""


def generate_game(task_type: str, seed: int, size: SceneSize | None = None) -> GeneratedGame:
    """Draw one game.

    Args:
        task_type: one of :data:`~spear_lightning.environments.alfworld.rooms.TASK_TYPES`.
        seed: names the game; equal ``(task_type, seed, size)`` give equal games.
        size: how large the room is; default :class:`SceneSize`.

    Returns:
        The game. It is solvable by construction, but only the planner's proof makes it official.

    Raises:
        ValueError: ``task_type`` is not a task type.
    """
    if task_type not in TASK_TYPES:
        raise ValueError(f"unknown ALFWorld task type {task_type!r}; known: {', '.join(TASK_TYPES)}")
    from alfworld.gen import constants

    size = size or SceneSize()
    rng = random.Random(stream_seed("alfworld", task_type, seed))
    for _ in range(_ATTEMPTS):
        room_name = rng.choice(sorted(constants.GOALS_VALID[task_type]))
        room = ROOMS[room_name]
        goal = _draw_goal(task_type, room, rng)
        if goal is None:
            continue
        scene = _draw_scene(task_type, room, goal, size, rng)
        if scene is not None:
            return _write(task_type, seed, goal, scene, rng.choice(list(constants.SCENE_TYPE[room_name])), rng)
    raise RuntimeError(f"no room was found for {task_type}, seed {seed}")  # a hole in rooms.ROOMS


def _fits(receptacle: str, type_name: str) -> bool:
    from alfworld.gen import constants

    return type_name in constants.VAL_RECEPTACLE_OBJECTS.get(receptacle, ())


def _draw_goal(task_type: str, room: Room, rng: random.Random) -> _Goal | None:
    from alfworld.gen import constants

    appliance, affordance = _APPLIANCES.get(task_type, ("", ""))
    if appliance and appliance not in room.receptacles:
        return None
    target = rng.choice(room.objects)
    if affordance and target not in constants.VAL_ACTION_OBJECTS[affordance]:
        return None
    # A target that starts in the appliance or at its destination would make the task trivial or ambiguous.
    places = [receptacle for receptacle in room.receptacles if _fits(receptacle, target) and receptacle != appliance]
    if task_type == "look_at_obj_in_light":
        return _Goal(target, tuple(places), lamp=rng.choice(LAMPS)) if places else None
    if len(places) < 2:
        return None
    parent = rng.choice(places)
    return _Goal(target, tuple(r for r in places if r != parent), parent=parent, appliance=appliance)


def _draw_scene(task_type: str, room: Room, goal: _Goal, size: SceneSize, rng: random.Random) -> _Scene | None:
    scene = _Scene(rng)
    needed = [rng.choice(goal.sources), *filter(None, (goal.parent, goal.appliance))]
    if goal.lamp:
        stands = [receptacle for receptacle in LAMP_STANDS if receptacle in room.receptacles]
        needed.append(rng.choice(stands))
    left = dict(room.receptacles)
    for type_name in dict.fromkeys(needed):
        scene.furnish(type_name)
        left[type_name] -= 1
    total = rng.randint(*size.receptacles)
    while len(scene.receptacles) < total and any(left.values()):
        # Weighted by what is left, so that a room has many drawers and one fridge.
        type_name = rng.choices(list(left), weights=list(left.values()))[0]
        scene.furnish(type_name)
        left[type_name] -= 1

    sources = scene.of_type(*goal.sources)
    for _ in range(2 if task_type == "pick_two_obj_and_place" else rng.randint(1, 2)):
        scene.put(goal.target, sources)
    if goal.lamp:
        scene.put(goal.lamp, scene.of_type(*LAMP_STANDS))
    others = [
        type_name
        for type_name in room.objects
        if type_name != goal.target and any(_fits(receptacle, type_name) for receptacle in scene.receptacles.values())
    ]
    if not others:
        return None
    for _ in range(rng.randint(*size.distractors)):
        type_name = rng.choice(others)
        scene.put(type_name, [i for i, receptacle in scene.receptacles.items() if _fits(receptacle, type_name)])
    return scene


def _write(task_type: str, seed: int, goal: _Goal, scene: _Scene, plan: int, rng: random.Random) -> GeneratedGame:
    from alfworld.gen import constants, goal_library
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    locations = {
        receptacle: f"loc|{number}|{rng.randint(-9, 9)}|{rng.randint(0, 3)}|{rng.choice((0, 15, 30, 45, 60))}"
        for number, receptacle in enumerate(scene.receptacles)
    }
    start = f"loc|{len(locations)}|{rng.randint(-9, 9)}|0|30"
    receptacle_types = sorted(set(scene.receptacles.values()))
    object_types = sorted({type_name for type_name, _ in scene.objects.values()})
    types = {identifier: type_name for identifier, (type_name, _) in scene.objects.items()}

    facts = [f"receptacleType {r} {type_name}Type" for r, type_name in scene.receptacles.items()]
    facts += [f"objectType {o} {type_name}Type" for o, type_name in types.items()]
    facts += [f"canContain {r}Type {o}Type" for r in receptacle_types for o in object_types if _fits(r, o)]
    facts += [f"pickupable {o}" for o, type_name in types.items() if type_name not in LAMPS]
    facts += [f"isReceptacleObject {o}" for o, t in types.items() if t in constants.MOVABLE_RECEPTACLES_SET]
    facts += [
        f"openable {r}" for r, type_name in scene.receptacles.items() if type_name in constants.OPENABLE_CLASS_SET
    ]
    facts += [f"atLocation agent1 {start}"]
    for affordance in ("Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable"):
        able = constants.VAL_ACTION_OBJECTS[affordance]
        facts += [f"{affordance.lower()} {o}" for o, type_name in types.items() if type_name in able]
    facts += [f"inReceptacle {o} {receptacle}" for o, (_, receptacle) in scene.objects.items()]
    facts += [f"objectAtLocation {o} {locations[receptacle]}" for o, (_, receptacle) in scene.objects.items()]
    facts += [f"receptacleAtLocation {r} {location}" for r, location in locations.items()]

    declarations = ["agent1 # agent"]
    declarations += [f"{t}Type # otype" for t in sorted({*object_types, *_DOMAIN_OBJECTS})]
    declarations += [f"{t}Type # rtype" for t in sorted({*receptacle_types, *_DOMAIN_RECEPTACLES})]
    declarations += [f"{o} # object" for o in scene.objects]
    declarations += [f"{r} # receptacle" for r in scene.receptacles]
    declarations += [f"{location} # location" for location in (start, *locations.values())]

    words = {"obj": goal.target, "recep": goal.parent, "toggle": goal.lamp, "mrecep": ""}
    goal_text = goal_library.gdict[task_type]["pddl"].format(**words)
    templates = goal_library.gdict[task_type]["templates"]
    instruction = rng.choice(templates).format(**{name: word.lower() for name, word in words.items()})
    trial = f"trial_T{seed:08d}"
    lines = [f"(define (problem plan_{trial})", "(:domain alfred)", "(:objects", *declarations, ")", "(:init"]
    lines += [*(f"({fact})" for fact in facts), ")", goal_text]
    with open(ALFRED_PDDL_PATH, encoding="utf-8") as domain, open(ALFRED_TWL2_PATH, encoding="utf-8") as grammar:
        return GeneratedGame(
            name=f"{task_type}-{goal.target}-None-{goal.parent or goal.lamp}-{plan}",
            trial=trial,
            task_type=task_type,
            domain=domain.read(),
            grammar=grammar.read().replace("UNKNOWN GOAL", instruction),
            problem="\n".join(lines).translate(_ESCAPES),
            parameters={
                "object_target": goal.target,
                "parent_target": goal.parent,
                "toggle_target": goal.lamp,
                "mrecep_target": "",
                "object_sliced": False,
            },
            instruction=instruction,
            scene=plan,
        )

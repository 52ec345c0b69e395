"""Small real Gymnasium environments, some of which misbehave on request. Imported by worker processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import gymnasium

from spear_lightning.environments.base import Split, Task, TaskSuite

_numbers = itertools.count()


class Countdown(gymnasium.Env[str, str]):
    """Say "down" as often as the number that was told; other words do harm."""

    def __init__(self, start: int = 3) -> None:
        self.start = start
        self.observation_space = gymnasium.spaces.Text(10_000)
        self.action_space = gymnasium.spaces.Text(10_000)
        self.number = next(_numbers)  # of the environment within its process

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.name = (options or {}).get("task", "")
        self.left = self.start + int(self.np_random.integers(3))
        if self.name == "bad reset":
            raise KeyError("no such game")
        return f"{self.name}: {self.left} left", self.info()

    def info(self) -> dict[str, Any]:
        return {
            "admissible_actions": ["down", "up"],
            "won": self.left == 0,
            "task": f"count down {self.name}",
            "anchor": str(self.left),
        }

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == "raise":
            raise RuntimeError("the engine broke")
        if action == "exit":
            sys.exit(3)
        if action == "crash":
            os._exit(7)
        if action == "hang":
            time.sleep(3600)
        if action == "child":
            child = subprocess.Popen(["sleep", "3600"])
            return str(child.pid), 0.0, False, False, self.info()
        if action == "nan":
            return "", float("nan"), False, False, self.info()
        if action == "image":
            return [1, 2], 0.0, False, False, self.info()  # type: ignore[return-value]
        if action == "echo number":
            return str(self.number), 0.0, False, False, self.info()
        if action == "echo modules":
            return " ".join(sys.modules), 0.0, False, False, self.info()
        if action == "echo environment":
            return f"{os.environ['OMP_NUM_THREADS']} {os.getpid()}", 0.0, False, False, self.info()
        self.left += {"down": -1, "up": 1}.get(action, 0)
        text = f"{self.left} left after {action}"
        return text, float(self.left == 0), self.left == 0, self.left > 12, self.info()


class Tiny(TaskSuite):
    def tasks(self, split: Split) -> list[Task]:
        return [Task(f"{split} {number}", seed=number) for number in range(64)]

    def make(self) -> gymnasium.Env[Any, Any]:
        return Countdown()


class Unmakeable(Tiny):
    def make(self) -> gymnasium.Env[Any, Any]:
        raise ModuleNotFoundError("No module named 'alfworld'; install spear-lightning[alfworld]")


class Suicidal(Tiny):
    def make(self) -> gymnasium.Env[Any, Any]:
        os._exit(9)


def not_an_environment() -> str:
    return "hello"


class Toss(gymnasium.Env[str, str]):
    """The only action wins or loses by its letters; every third task cannot be won."""

    observation_space = gymnasium.spaces.Text(10_000)
    action_space = gymnasium.spaces.Text(10_000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = int((options or {})["task"].split()[1])
        room = (
            "you are in the middle of a room. looking quickly around you, you see a desk 1, a drawer 2, and a shelf 1."
        )
        return room, {"won": False, "task": "put some mug on desk."}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        won = self.number % 3 > 0 and zlib.crc32(f"{self.number} {action}".encode()) % 2 == 0
        return "nothing", float(won), True, False, {"won": won}


class Tossed(Tiny):
    def make(self) -> gymnasium.Env[Any, Any]:
        return Toss()


class Gate(Countdown):
    """The first task's steps wait until a file is there; who wins another task makes it."""

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__()
        self.file, self.seconds = file, seconds

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.name == "train 0":
            end = time.monotonic() + self.seconds
            while not self.file.exists():
                if time.monotonic() > end:
                    raise TimeoutError("nobody opened the gate")
                time.sleep(0.002)
        answer = super().step(action)
        if answer[2] and self.name != "train 0":
            self.file.touch()
        return answer


class Gated(Tiny):
    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self.seconds = file, seconds

    def make(self) -> gymnasium.Env[Any, Any]:
        return Gate(self.file, self.seconds)

"""Sandboxes to test with. Imported by worker processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic_monty import CollectString, Monty, MontyError


@dataclass
class Ran:
    stdout: str
    error: str | None = None


class MontySandbox:
    """A real evaluator of a subset of Python."""

    def __init__(self) -> None:
        self._pool: Any = Monty()
        self._pool.__enter__()

    def run(self, code: str) -> Ran:
        printed = CollectString()
        with self._pool.checkout() as session:
            try:
                session.feed_run(code, print_callback=printed)
            except MontyError as error:
                return Ran(printed.output, str(error))
        return Ran(printed.output)

    def close(self) -> None:
        self._pool.__exit__(None, None, None)


class Fragile:
    """Breaks on request; remembers."""

    opened = 0
    closed = 0

    def __init__(self) -> None:
        Fragile.opened += 1
        self.number = Fragile.opened

    def run(self, code: str) -> Ran:
        if code == "break once" and self.number == 1:
            raise OSError("the sandbox broke")
        if code == "break":
            raise OSError("the sandbox broke")
        return Ran(code)

    def close(self) -> None:
        Fragile.closed += 1
        raise OSError("cannot close")


def refuse() -> MontySandbox:
    raise RuntimeError("no sandbox works on this machine: install bubblewrap")

"""Reads a JSON file of any size one entry at a time: an array of objects, or an object of entries.

WebShop's catalogue is a single JSON array of more than five gigabytes; ``json.load`` would need many times that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_CHUNK = 1 << 20  # characters read at a time
_LONGEST = 1 << 26  # characters of one entry; more is taken for a broken file
_SPACE = re.compile(r"[ \t\r\n]*")


def read_array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON array.

    Yields:
        The number of each record, from 1, and the record.

    Raises:
        ValueError: the file is missing, no JSON array, cut off, or an entry is no object; the message names the file,
            the record and the line.
    """
    with _opened(path) as file:
        reader = _Reader(file, path)
        reader.open("[")
        number = 0
        while not reader.closed("]", number):
            number += 1
            value = reader.value(f"record {number}")
            if not isinstance(value, dict):
                reader.fail(f"record {number} is a JSON {type(value).__name__}, not an object")
            yield number, value
        reader.end()


def read_object(path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a JSON object.

    Yields:
        Key and value of each.

    Raises:
        ValueError: the file is missing, no JSON object, or cut off; the message names the file, the entry and the line.
    """
    with _opened(path) as file:
        reader = _Reader(file, path)
        reader.open("{")
        number = 0
        while not reader.closed("}", number):
            number += 1
            key = reader.value(f"the key of entry {number}")
            if not isinstance(key, str):
                reader.fail(f"entry {number} has no name")
            reader.expect(":", f"after {key!r}")
            yield key, reader.value(f"entry {key!r}")
        reader.end()


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    """Parses values out of a window that slides over a file."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0
        self._lines = 1  # line on which the window starts
        self._ended = False

    def open(self, bracket: str) -> None:
        """Take the bracket that the file starts with."""
        if self._peek() != bracket:
            kind = "array" if bracket == "[" else "object"
            self.fail(f"it is no JSON {kind}: it does not start with {bracket}")
        self._at += 1

    def closed(self, bracket: str, number: int) -> bool:
        """Whether the closing bracket comes next; otherwise take the comma, if one is due after ``number`` entries."""
        if self._peek() == bracket:
            self._at += 1
            return True
        if number:
            self.expect(",", f"after entry {number}")
        return False

    def expect(self, character: str, where: str) -> None:
        """Take ``character``."""
        found = self._peek()
        if found != character:
            self.fail(f"the file is cut off {where}" if not found else f"{character!r} expected {where}, not {found!r}")
        self._at += 1

    def value(self, what: str) -> Any:
        """Take a whole JSON value."""
        if not self._peek():
            self.fail(f"the file is cut off before {what}")
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:  # noqa: PERF203 - one pass, as a rule
                size = len(self._text) - self._at
                # What fails well before the window's end is wrong; at its end it may only be unfinished.
                unfinished = error.msg.startswith("Unterminated string") or error.pos + 16 > len(self._text)
                if not unfinished or size > _LONGEST or not self._more():
                    self.fail(f"{what} is not valid JSON ({error.msg} at character {error.pos - self._at} of it)")
            except RecursionError:
                self.fail(f"{what} is nested too deeply")
            else:
                if end < len(self._text) or not self._more():  # a number may go on in the next window
                    self._at = end
                    return value

    def end(self) -> None:
        """Nothing may follow."""
        if found := self._peek():
            self.fail(f"{found!r} follows the end of the JSON value")

    def fail(self, what: str) -> None:
        """Raise, with file and line."""
        line = self._lines + self._text.count("\n", 0, self._at)
        raise ValueError(f"{self._path}, line {line}: {what}; download or generate the file again")

    def _peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read on and drop what was taken; whether there was anything to read."""
        if self._ended:
            return False
        try:
            chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
        except UnicodeDecodeError as error:
            self.fail(f"it is not UTF-8 text ({error.reason})")
        self._ended = not chunk
        if chunk:
            self._lines += self._text.count("\n", 0, self._at)
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

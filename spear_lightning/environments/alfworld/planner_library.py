"""Copies of Fast Downward's shared library, one for each environment.

The library keeps the state of one game in global variables, so every environment needs a copy under a name of its own.
``fast_downward.load_lib`` copies all 34 MB, of which 32 MB are debugging symbols that stay on the disk (or, where the
temporary folder is in memory, in memory) until the process ends. Here only what the dynamic loader maps is copied.
"""

from __future__ import annotations

import ctypes
import struct
import tempfile
from ctypes import POINTER, c_bool, c_char_p, c_int
from pathlib import Path
from typing import Any

_SEGMENT_TO_LOAD = 1  # PT_LOAD
_HEADERS = 4096  # bytes; ample for the file's and the program headers


def loadable_size(elf: bytes) -> int:
    """How much of a 64-bit little-endian ELF file its loadable segments span, in bytes from the start.

    Args:
        elf: the file, or at least its program headers.

    Returns:
        The end of the last loadable segment.

    Raises:
        ValueError: it is another kind of file.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 32)
    entry_size, entries = struct.unpack_from("<HH", elf, 54)
    end = 0
    for number in range(entries):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", elf, table + number * entry_size)
        if kind == _SEGMENT_TO_LOAD:
            end = max(end, offset + size)
    return end


def load_library() -> Any:
    """A new copy of the planner, with the argument types that ``fast_downward.load_lib`` declares.

    It is never unloaded: a process that has unloaded one (``fast_downward.close_lib``) ends in a segmentation fault.
    Hand it on to the next environment instead.
    """
    from fast_downward import Atom, Operator
    from fast_downward.interface import DOWNWARD_LIB_PATH

    with open(DOWNWARD_LIB_PATH, "rb") as file:
        content = file.read(_HEADERS)
        try:
            content += file.read(loadable_size(content) - len(content))
        except (ValueError, struct.error):  # a format we do not know: all of it
            content += file.read()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "libdownward.so"
        copy.write_bytes(content)
        library = ctypes.CDLL(str(copy))
    signatures: dict[str, tuple[list[Any], Any]] = {
        "load_sas": ([c_char_p], None),
        "load_sas_replan": ([c_char_p], None),
        "get_applicable_operators_count": ([], c_int),
        "get_applicable_operators": ([POINTER(Operator)], None),
        "get_state_size": ([], c_int),
        "get_state": ([POINTER(Atom)], None),
        "apply_operator": ([c_int, POINTER(Atom)], c_int),
        "check_goal": ([], c_bool),
        "replan": ([c_bool], c_bool),
        "get_last_plan_length": ([], c_int),
        "get_last_plan": ([POINTER(Operator)], None),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = result
    return library

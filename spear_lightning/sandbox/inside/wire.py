"""The messages between the host and the zygote: a fixed header, then bytes that neither side interprets."""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass

MAX_CODE_BYTES = 4 << 20
_REQUEST = struct.Struct("<BIdI")
_REPLY = struct.Struct("<BiII")


class Action(enum.IntEnum):
    """What the host asks for."""

    RUN = 0
    RUN_IN_SESSION = 1
    END_SESSION = 2


class Outcome(enum.IntEnum):
    """How a call ended; the reply's ``value`` is the exit code or the signal where there is one."""

    READY = 0
    EXITED = 1
    SIGNALLED = 2
    WALL = 3
    CPU = 4
    OUTPUT = 5
    REFUSED = 6


@dataclass(frozen=True, slots=True)
class Request:
    """One message from the host.

    Attributes:
        action: what to do.
        session: number of the session; 0 for a call of its own.
        wall: seconds the call may take.
        code: the snippet, encoded as UTF-8 (lone surrogates passed through).
    """

    action: Action
    session: int = 0
    wall: float = 0.0
    code: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """One message from the zygote.

    Attributes:
        outcome: how the call ended.
        value: exit code or signal number.
        stdout: what the snippet wrote there, up to the limit.
        stderr: likewise; carries the traceback of an exception.
        alive: whether the session, if the call was in one, still exists.
    """

    outcome: Outcome
    value: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    alive: bool = False


def pack_request(request: Request) -> bytes:
    """The bytes of a request."""
    return _REQUEST.pack(request.action, request.session, request.wall, len(request.code)) + request.code


def read_request(descriptor: int) -> Request | None:
    """The next request, waiting for it; ``None`` once the other side closed."""
    header = read_all(descriptor, _REQUEST.size)
    if header is None:
        return None
    action, session, wall, length = _REQUEST.unpack(header)
    code = read_all(descriptor, length)
    return None if code is None else Request(Action(action), session, wall, code)


def pack_reply(reply: Reply) -> bytes:
    """The bytes of a reply."""
    kind = reply.outcome | (0x80 if reply.alive else 0)
    return _REPLY.pack(kind, reply.value, len(reply.stdout), len(reply.stderr)) + reply.stdout + reply.stderr


def unpack_reply(data: bytes | bytearray) -> Reply | None:
    """The reply that ``data`` holds, or ``None`` while bytes are missing.

    Raises:
        ValueError: the bytes are no reply.
    """
    if len(data) < _REPLY.size:
        return None
    kind, value, out, err = _REPLY.unpack_from(data)
    outcome = Outcome(kind & 0x7F)
    if len(data) < _REPLY.size + out + err:
        return None
    body = bytes(data[_REPLY.size : _REPLY.size + out + err])
    return Reply(outcome, value, body[:out], body[out:], bool(kind & 0x80))


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything.

    Raises:
        OSError: the other side is gone.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_all(descriptor: int, length: int) -> bytes | None:
    """Read exactly ``length`` bytes, waiting for them; ``None`` once the other side closed."""
    data = bytearray()
    while len(data) < length:
        piece = os.read(descriptor, min(1 << 20, length - len(data)))
        if not piece:
            return None
        data += piece
    return bytes(data)

"""Two hosts on one machine: network namespaces, joined by a virtual cable that can be cut. Needs root."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

INTERFACE = "cable"
_number = count()


class Hosts:
    """Names and addresses of two hosts, and commands on them."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names
        self.addresses = ("10.77.0.1", "10.77.0.2")

    def on(self, host: int, command: list[str]) -> list[str]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self.names[host], *command]

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.names[1], "link", "set", INTERFACE, "down")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts, whose names no other process uses; gone afterwards, with everything that still runs on them."""
    number = next(_number)
    hosts = Hosts((f"spear-{os.getpid()}-{number}-a", f"spear-{os.getpid()}-{number}-b"))
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        first, second = hosts.names
        _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", name, "link", "set", interface, "up")
        yield hosts
    finally:
        for name in hosts.names:
            running = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in running.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def enter(name: str) -> None:
    """Let this process, which must have a single thread, be on a host of that name from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")


def why_not() -> str | None:
    """Why there can be no such hosts here; ``None`` where there can."""
    if shutil.which("ip") is None:
        return "no ip command (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.strip()}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

"""How much memory a device has left."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_UNLIMITED = 2**60  # cgroups write "max", or a number near 2**63


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Memory in bytes that can still be allocated on a device; ``None`` where it is unknown.

    Args:
        device: a GPU, or the CPU: then the machine's available memory, or what its control group still allows.
        root: of ``/proc`` and ``/sys``.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch has reserved and does not use can be allocated too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    available = re.search(r"MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"))
    known = [] if available is None else [1024 * int(available[1])]
    for limit, used in (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        allowed, taken = _text(root / limit).strip(), _text(root / used).strip()
        if allowed.isdigit() and taken.isdigit() and int(allowed) < _UNLIMITED:
            known.append(max(0, int(allowed) - int(taken)))
    return min(known, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

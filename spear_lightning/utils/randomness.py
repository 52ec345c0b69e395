"""Counter-based randomness: what is drawn depends on names, never on the order in which things happen.

Every random decision of a run is keyed by what it is *for* — (seed, iteration, task, index in the group, turn) for
an episode — so batching, worker count and number of ranks cannot change what is played or learned from.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def stream_seed(*names: int | str) -> int:
    """Fold a tuple of names into a 63-bit seed.

    Args:
        names: integers and strings, in a fixed order, that name the stream (for example
            ``("episode", seed, iteration, task_id, index, turn)``).

    Returns:
        An integer in ``[0, 2**63)``, equal on every machine and Python version.
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def uniforms(seed: int, count: int) -> npt.NDArray[np.float64]:
    """The first ``count`` numbers of the stream ``seed``, uniform in [0, 1), float64 of shape ``(count,)``."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)

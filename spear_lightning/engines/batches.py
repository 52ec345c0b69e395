"""Checking requests and grouping them by length."""

from __future__ import annotations

from collections.abc import Sequence

from spear_lightning.engines.base import Request


def check_requests(requests: Sequence[Request], vocabulary: int) -> None:
    """Refuse malformed requests.

    Args:
        requests: of one call.
        vocabulary: number of token ids the model knows.

    Raises:
        ValueError: two requests share a session, or a prompt is empty or has an unknown token id.
    """
    if len({request.session for request in requests}) < len(requests):
        raise ValueError("two requests of one call have the same session")
    for request in requests:
        ids = request.prompt_ids
        if not len(ids):
            raise ValueError(f"session {request.session}: the prompt is empty")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"session {request.session}: the prompt has token id {low if low < 0 else high}, but the model's "
                f"vocabulary has {vocabulary} entries"
            )


def similar_lengths(lengths: Sequence[int], *, most_tokens: int, pass_tokens: int = 128) -> list[list[int]]:
    """Group sequences by length at the least cost of padding and forward passes.

    A group costs its number of rows times its longest length, plus what a pass costs by itself. The best cut of the
    sorted lengths is found exactly, going from short to long.

    Args:
        lengths: of the sequences, each at least 1.
        most_tokens: a group of several sequences holds at most so many, padding included.
        pass_tokens: cost of a forward pass beyond its tokens, counted in tokens (on a tiny model on a CPU 2 ms, where a
            token takes 20 µs).

    Returns:
        Numbers of the sequences, ``0`` to ``len(lengths) - 1``, by group.

    >>> similar_lengths([3, 500, 4, 510], most_tokens=2048, pass_tokens=10)
    [[0, 2], [1, 3]]
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    ends = [i for i in range(1, len(order) + 1) if i == len(order) or lengths[order[i]] > lengths[order[i - 1]]]
    costs, starts = {0: 0}, {0: 0}
    for end in ends:
        longest = lengths[order[end - 1]]
        capacity = max(1, most_tokens // longest)
        costs[end], starts[end] = min(
            (cost + (end - start) * longest + -(-(end - start) // capacity) * pass_tokens, start)
            for start, cost in costs.items()
        )
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start, capacity = starts[end], max(1, most_tokens // lengths[order[end - 1]])
        groups += [sorted(order[at : min(at + capacity, end)]) for at in range(start, end, capacity)]
        end = start
    return sorted(groups)

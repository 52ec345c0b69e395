"""The formulas of operations and messages, by hand."""

from __future__ import annotations

from dataclasses import replace

from measuring.costs import checkpoint_bytes, replica_messages, update_flops, update_messages

from spear_lightning.planning.shape import Layout
from tests.planning.test_memory import FLOAT32, TINY, ZERO


def test_costs_by_hand():
    attention = 4 * 2 * 8 * 10
    assert update_flops(TINY, 700, 10, 10, False) == 10 * (3 * (2 * 700 + attention) + 8 * 50 * 8)
    assert update_flops(TINY, 700, 10, 10, True) == 10 * (4 * (2 * 700 + attention) + 8 * 50 * 8)
    assert update_flops(replace(TINY, trainable=100), 700, 1, 0, False) == 4 * 700 + 2 * 100 + 6 * 50 * 8
    messages = [update_messages(TINY, ZERO, Layout(4, 4, stage), 3) for stage in (0, 1, 2, 3)]
    assert messages == [4000, 6000, 14000, 18000]
    assert update_messages(TINY, FLOAT32, Layout(4, 4, gradient_copy=True), 3) == 8000
    assert update_messages(TINY, FLOAT32, Layout(), 3) == 0
    assert [replica_messages(TINY, ZERO, Layout(4, 4, stage)) for stage in (2, 3)] == [0, 2000]
    assert checkpoint_bytes(TINY, ZERO, Layout(4, 4, 2), replay_tokens=10) == 14_000 + 80
    assert checkpoint_bytes(TINY, ZERO, Layout(4, 4, 3)) == 12_000

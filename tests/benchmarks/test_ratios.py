"""Runs in turns: who runs when, and which way round the ratios are."""

from __future__ import annotations

import pytest
from measuring import ratios


def test_sides_take_turns_and_the_first_one_is_compared_with_the_others(monkeypatch):
    now, order = [0.0], []

    def side(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(ratios.time, "perf_counter", lambda: now[0])
    found = ratios.compare({"ours": side("ours", 2.0), "theirs": side("theirs", 5.0)}, 3, work=10, unit="episodes")
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert found["ours"]["seconds"] == {"median": 2.0, "least": 2.0, "most": 2.0, "n": 3}
    assert found["theirs"]["episodes_per_second"] == pytest.approx(2.0)
    assert list(found["ratios"]) == ["theirs"]
    assert found["ratios"]["theirs"]["median"] == 2.5

"""Playing in the background, and what a checkpoint keeps of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spear_lightning.checkpoint.rank_state import played_from_states, played_to_state
from spear_lightning.rollout.episode import Episode, Rollout, Turn
from spear_lightning.rollout.runner import AsyncRollout, OnStep
from spear_lightning.rollout.specs import TrainingRollouts
from tests.data.made import make_episode, make_turn

CPU = torch.device("cpu")


def played(*episodes: Episode) -> Rollout:
    return Rollout.of("train", 4, episodes, {"generation": 1.0, "environment": 2.0, "other": 0.5})


def test_episodes_are_played_in_another_thread_and_waited_for() -> None:
    player, go, told = AsyncRollout(), threading.Event(), []
    result, threads = played(make_episode()), []

    def play(on_step: OnStep) -> Rollout:
        threads.append(threading.current_thread())
        on_step(1, 2)
        assert go.wait(20)
        return result

    player.start(3, play, CPU)
    assert player.iteration == 3
    with pytest.raises(RuntimeError, match="iteration 3 have not been taken"):
        player.start(4, play, CPU)

    def on_step(finished: int, active: int) -> None:
        told.append((finished, active, threading.current_thread()))
        go.set()

    assert player.take(on_step) is result
    assert told == [(1, 2, threading.main_thread())], "listeners hear of it in the thread that they live in"
    assert threads[0] is not threading.main_thread()
    assert player.iteration is None
    assert player.wait() is None
    with pytest.raises(RuntimeError, match="no episodes"):
        player.take()


def test_what_goes_wrong_is_told_to_whoever_waits() -> None:
    player = AsyncRollout()

    def fail(on_step: OnStep) -> Rollout:
        raise ValueError("the environments are gone")

    player.start(0, fail, CPU)
    with pytest.raises(ValueError, match="the environments are gone"):
        player.take()
    player.start(0, lambda on_step: played(), CPU)
    assert player.take().episodes == []


def test_a_cancelled_rollout_ends_after_its_step() -> None:
    player, begun, steps = AsyncRollout(), threading.Event(), []

    def play(on_step: OnStep) -> Rollout:
        while len(steps) < 10**9:
            steps.append(1)
            begun.set()
            on_step(0, 1)
        raise AssertionError

    player.start(0, play, CPU)
    assert begun.wait(20)
    player.cancel()
    assert player.wait() is None
    result = played()
    player.start(4, lambda on_step: result, CPU)
    assert player.wait() is result


def test_what_a_checkpoint_had_is_kept_until_it_is_taken() -> None:
    player, result = AsyncRollout(), played(make_episode())
    player.keep(result)
    assert (player.iteration, player.wait()) == (4, result)
    assert player.take() is result


@pytest.mark.parametrize("staleness", [-1, 2])
def test_more_than_one_iteration_ahead_is_refused(staleness: int) -> None:
    with pytest.raises(ValueError, match=r"data\.rollouts\.max_staleness must be 0 .* or 1 .*, not"):
        TrainingRollouts(max_staleness=staleness)


# --- in checkpoints ---------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """With lists for arrays, so that it can be compared; NaN for NaN."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), [None if x != x else x for x in value.tolist()])
    if isinstance(value, Episode | Turn):
        return {name: plain(getattr(value, name)) for name in type(value).__slots__}
    return [plain(item) for item in value] if isinstance(value, list) else value


def various() -> list[Episode]:
    """Different in everything, and with NumPy's numbers where environments may give them."""
    long = make_turn(5, prompt=30, reward=np.float64(0.5), action=None, valid=False, finish="length")
    unknown = make_turn(2, prompt=0, entropies=np.full(2, np.nan, np.float32))
    return [
        make_episode(0, 0, success=np.bool_(True), weight_version=7, iteration=4, context="stepwise"),
        make_episode(0, 1, turns=0, status="aborted", reason="worker died"),
        make_episode(1, 0, turns=0),
        make_episode(1, 1, answer="42", score=np.float32(0.25)),
        make_episode(2, 0),
        replace(make_episode(2, 1), turns=[long, unknown, long]),
    ]


def saved(state: Any, folder: Any) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def test_episodes_come_back_from_a_checkpoint(tmp_path: Any) -> None:
    state = saved(played_to_state(played(*various())), tmp_path)
    again = played_from_states([state], 0, 1)
    assert (again.split, again.iteration, again.seconds) == ("train", 4, played().seconds)
    assert plain(again.episodes) == plain(played(*various()).episodes)
    assert plain(again.aborted) == plain(played(*various()).aborted)


def test_episodes_are_dealt_over_other_ranks_as_tasks_are(tmp_path: Any) -> None:
    whole = various()
    states = [saved(played_to_state(played(*(e for e in whole if e.group % 2 == rank))), tmp_path) for rank in range(2)]
    for size in (1, 2, 3):
        for rank in range(size):
            mine = played_from_states(states, rank, size)
            assert plain(mine.episodes) == plain(played(*(e for e in whole if e.group % size == rank)).episodes)
            assert len(mine.aborted) == (rank == 0)


def test_nothing_played_is_nothing_lost(tmp_path: Any) -> None:
    again = played_from_states([saved(played_to_state(played()), tmp_path)], 0, 1)
    assert again.episodes == []


def test_episodes_of_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match="format 9"):
        played_from_states([{**played_to_state(played()), "format": 9}], 0, 1)

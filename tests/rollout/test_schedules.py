"""Episodes are the same whenever their environments are stepped; who is slow holds up nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from spear_lightning.agents.base import Agent
from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.engines.base import BatchStream, Completion, CompletionStream, Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.base import Task
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Asynchronous, Collector, Lockstep, RolloutSchedule, deal
from spear_lightning.rollout.episode import Episode
from spear_lightning.rollout.specs import EpisodeSpec
from tests.agents.players import ScriptedEngine, byte_tokenizer
from tests.environments.tiny_environments import Gated, Tiny
from tests.rollout.test_collector import always, content, make, play, specs

SCHEDULES = [Lockstep(2), Lockstep(3), Lockstep(50), Asynchronous()]


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(Tiny(), workers=2, step_timeout=20.0) as pool:
        yield pool


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("agent", [TranscriptAgent, StepwiseAgent])
@pytest.mark.parametrize("limits", [{}, {"max_active": 5}, {"max_episode_tokens": 300}], ids=str)
def test_the_same_episodes_under_every_schedule(
    pool: EnvironmentPool, schedule: RolloutSchedule, agent: type[Agent], limits: dict[str, int]
) -> None:
    todo = [*specs(4, 3), EpisodeSpec(Task("bad reset"), 4, 0)]
    reference = play(make(pool, agent=agent(), **limits)[0], todo)
    expected = [content(episode) for episode in (*reference.episodes, *reference.aborted)]
    collector, engine = make(pool, agent=agent(), **limits)
    collector.schedule = schedule
    played = play(collector, todo)
    assert [content(episode) for episode in (*played.episodes, *played.aborted)] == expected
    assert len(set(engine.ended)) == len(todo) == len(expected)
    assert not pool.pending


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_counts_that_are_reported(pool: EnvironmentPool, schedule: RolloutSchedule) -> None:
    collector, _ = make(pool, max_active=4)
    collector.schedule = schedule
    steps: list[tuple[int, int]] = []
    collector.play(
        specs(4, 3),
        Sampling(64),
        iteration=0,
        seed=5,
        max_turns=12,
        on_step=lambda *counts: steps.append(counts),
    )
    assert steps[-1] == (12, 0)
    assert all(active <= 4 for _, active in steps)
    assert [finished for finished, _ in steps] == sorted(finished for finished, _ in steps)


@pytest.mark.parametrize("schedule", [Lockstep(2), Asynchronous()], ids=str)
@pytest.mark.parametrize("agent", [TranscriptAgent, StepwiseAgent])
def test_real_engine_plays_the_same_tokens(
    pool: EnvironmentPool, tiny_policy: Callable[..., Policy], agent: type[Agent], schedule: RolloutSchedule
) -> None:
    policy = tiny_policy("qwen2")
    player = agent()
    player.bind(policy.tokenizer)

    def played(schedule: RolloutSchedule) -> list[Episode]:
        engine = HuggingFaceEngine()
        engine.sync(policy, 1)
        collector = Collector(pool, player, engine, schedule=schedule)
        return collector.play(specs(3, 2), Sampling(max_new_tokens=6), iteration=0, seed=1, max_turns=4).episodes

    one, other = played(Lockstep()), played(schedule)
    for left, right in zip(one, other, strict=True):
        assert [turn.response_ids.tolist() for turn in left.turns] == [t.response_ids.tolist() for t in right.turns]
        assert [turn.observation for turn in left.turns] == [turn.observation for turn in right.turns]
        for a, b in zip(left.turns, right.turns, strict=True):
            np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
    if isinstance(schedule, Lockstep):
        assert [content(episode) for episode in played(schedule)] == [content(episode) for episode in other]


def sessions_of(engine: ScriptedEngine) -> list[list[str]]:
    return [[request.session for request in call] for call in engine.calls]


class GateOpener(ScriptedEngine):
    """Opens the gate at its second call."""

    def __init__(self, file: Path) -> None:
        super().__init__(byte_tokenizer(tags=True), always("<action>down</action>"))
        self.file = file

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if len(self.calls) == 1:
            self.file.touch()
        return super().generate(requests)


def through_the_gate(
    file: Path, schedule: RolloutSchedule, seconds: float, opened_by_engine: bool
) -> tuple[list[Episode], ScriptedEngine]:
    with EnvironmentPool(Gated(file, seconds), workers=2) as pool:
        collector, engine = make(pool, always("<action>down</action>"))
        if opened_by_engine:
            collector.engine = engine = GateOpener(file)
        collector.schedule = schedule
        played = play(collector, specs(2, 1))
        return [*played.aborted, *played.episodes], engine


def test_no_episode_waits_for_the_environment_of_another_one(tmp_path: Path) -> None:
    """The slow environment answers only when the other episode is over."""
    episodes, _ = through_the_gate(tmp_path / "one", Asynchronous(), 30.0, False)
    assert [episode.status for episode in episodes] == ["finished", "finished"]
    episodes, _ = through_the_gate(tmp_path / "two", Lockstep(), 0.3, False)
    assert "nobody opened the gate" in episodes[0].reason, "in step there is no way through"


class OneByOne(BatchStream):
    """Answers one request a poll, and opens the gate at the last one's."""

    def __init__(self, engine: OneByOneEngine) -> None:
        super().__init__(engine)
        self.engine, self.closed = engine, False

    def poll(self) -> dict[str, Completion]:
        if not self.engine.calls and len(self._requests) < 2:
            return {}  # the slow one's must be the first of two
        (session, request), *rest = sorted(self._requests.items())
        if len(self.engine.calls) == 1:
            self.engine.file.touch()
        self._requests = dict(rest)
        return dict(zip([session], self.engine.generate([request]), strict=True))

    def close(self) -> None:
        super().close()
        self.closed = True


class OneByOneEngine(ScriptedEngine):
    def __init__(self, file: Path, say: Callable[[str, float], str | None]) -> None:
        super().__init__(byte_tokenizer(tags=True), say)
        self.file = file
        self.streams: list[OneByOne] = []

    def stream(self) -> CompletionStream:
        self.streams.append(OneByOne(self))
        return self.streams[-1]


def test_the_engine_goes_on_while_environments_are_waited_for(tmp_path: Path) -> None:
    """The environment of the first answer answers only when the engine is at the second."""
    with EnvironmentPool(Gated(tmp_path / "gate", 2.0), workers=2) as pool:
        collector, _ = make(pool, always("<action>down</action>"))
        collector.engine = engine = OneByOneEngine(tmp_path / "gate", always("<action>down</action>"))
        collector.schedule = Asynchronous()
        played = play(collector, specs(2, 1))
    assert [episode.status for episode in played.episodes] == ["finished", "finished"], played.aborted
    assert all(stream.closed for stream in engine.streams)


def test_environments_are_stepped_while_another_wave_generates(tmp_path: Path) -> None:
    """The environment of the first wave answers only when the second wave generates."""
    episodes, engine = through_the_gate(tmp_path / "one", Lockstep(2), 30.0, True)
    assert [episode.status for episode in episodes] == ["finished", "finished"]
    episodes, _ = through_the_gate(tmp_path / "two", Lockstep(), 0.3, True)
    assert "nobody opened the gate" in episodes[0].reason
    # With the gate open all the time the batches are the same: they are no question of time.
    (tmp_path / "three").touch()
    _, quick = through_the_gate(tmp_path / "three", Lockstep(2), 30.0, True)
    assert sessions_of(quick) == sessions_of(engine)


def test_an_answer_does_not_wait_for_a_slow_one_behind_it(tmp_path: Path) -> None:
    with EnvironmentPool(Gated(tmp_path / "gate", 30.0), workers=1) as pool:
        tasks = Tiny().tasks("train")
        pool.reset({0: tasks[1], 1: tasks[0], 2: tasks[2]})
        pool.send_step({0: "down", 1: "down", 2: "down"})
        assert set(pool.gather([0])) == {0}
        assert pool.pending == {1, 2}
        (tmp_path / "gate").touch()
        assert set(pool.gather([1, 2])) == {1, 2}
        with pytest.raises(ValueError, match=r"slots \[1\] have no answer outstanding"):
            pool.gather([1])


@pytest.mark.parametrize("schedule", [Lockstep(2), Asynchronous()], ids=str)
def test_failing_engine_leaves_nothing_behind(pool: EnvironmentPool, schedule: RolloutSchedule) -> None:
    def fail(prompt: str, number: float) -> str:
        raise RuntimeError("out of memory")

    collector, engine = make(pool, fail)
    collector.schedule = schedule
    with pytest.raises(RuntimeError, match="out of memory"):
        play(collector, specs(2, 2))
    assert len(engine.ended) == 4
    assert not pool.pending


def test_a_stream_is_closed_when_its_engine_fails(pool: EnvironmentPool, tmp_path: Path) -> None:
    def fail(prompt: str, number: float) -> str:
        raise RuntimeError("out of memory")

    collector, _ = make(pool, fail)
    collector.engine = engine = OneByOneEngine(tmp_path / "gate", fail)
    collector.schedule = Asynchronous()
    with pytest.raises(RuntimeError, match="out of memory"):
        play(collector, specs(2, 2))
    assert [stream.closed for stream in engine.streams] == [True]


def test_groups_stay_together_where_there_are_enough() -> None:
    assert deal(specs(3, 4), 2) == [list(range(8)), list(range(8, 12))]
    assert deal(specs(1, 4), 2) == [[0, 1], [2, 3]]
    assert deal(specs(1, 2), 5) == [[0], [1]]
    assert deal([], 3) == []


def test_bad_count() -> None:
    with pytest.raises(ValueError, match=r"Lockstep\.count must be at least 1, not 0"):
        Lockstep(0)

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from spear_lightning.agents.base import Agent
from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.data.samples import samples_of
from spear_lightning.engines.base import Completion, Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.environments.base import Task
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Episode, Rollout
from spear_lightning.rollout.specs import EpisodeSpec
from tests.agents.players import ScriptedEngine, byte_tokenizer
from tests.environments.tiny_environments import Tiny

SAMPLING = Sampling(max_new_tokens=64)


def wander(prompt: str, number: float) -> str:
    """Mostly count down; what is said depends on the prompt too, so that a wrong one would show."""
    number = (number + len(prompt) / 7) % 1
    word = "down" if number < 0.7 else "up"
    return f"hm {len(prompt)}" if number > 0.95 else f"<think>{number}</think><action>{word}</action>"


def always(text: str | None) -> Callable[[str, float], str | None]:
    return lambda prompt, number: text


def specs(groups: int, size: int) -> list[EpisodeSpec]:
    tasks = Tiny().tasks("train")
    return [EpisodeSpec(tasks[group], group, index) for group in range(groups) for index in range(size)]


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(Tiny(), workers=2, step_timeout=20.0) as pool:
        yield pool


def make(
    pool: EnvironmentPool, say: Callable[[str, float], str | None] = wander, agent: Agent | None = None, **limits: int
) -> tuple[Collector, ScriptedEngine]:
    agent = agent or TranscriptAgent()
    tokenizer = byte_tokenizer(tags=True)
    agent.bind(tokenizer)
    engine = ScriptedEngine(tokenizer, say)
    return Collector(pool, agent, engine, **limits), engine


def play(collector: Collector, todo: list[EpisodeSpec], max_turns: int = 12, iteration: int = 3) -> Rollout:
    return collector.play(todo, SAMPLING, iteration=iteration, seed=5, max_turns=max_turns)


def content(episode: Episode) -> list[object]:
    """Everything in an episode, comparable."""
    turns = [
        [
            value.tolist() if isinstance(value, np.ndarray) else value
            for value in (getattr(turn, name) for name in names)
        ]
        for turn in episode.turns
        for names in [type(turn).__slots__]
    ]
    names = ("task", "group", "index", "iteration", "context", "score", "success", "answer", "status", "reason")
    return [*(getattr(episode, name) for name in names), episode.weight_version, turns]


@pytest.mark.parametrize("agent", [TranscriptAgent, StepwiseAgent])
def test_episode_does_not_depend_on_what_is_played_beside_it(pool: EnvironmentPool, agent: type[Agent]) -> None:
    todo = specs(4, 3)
    together = play(make(pool, agent=agent())[0], todo).episodes
    alone = [play(make(pool, agent=agent())[0], [spec]).episodes[0] for spec in todo]
    few, engine = make(pool, agent=agent(), max_active=5)
    refilled = play(few, todo).episodes
    assert max(map(len, engine.calls)) == 5
    with EnvironmentPool(Tiny(), workers=1) as single:
        backwards = play(make(single, agent=agent())[0], todo[::-1]).episodes[::-1]
    expected = [content(episode) for episode in together]
    assert len({str(episode[-1]) for episode in expected}) == len(todo), "no two episodes are alike"
    for others in (alone, refilled, backwards):
        assert [content(episode) for episode in others] == expected
    later = play(make(pool, agent=agent())[0], todo, iteration=4).episodes
    assert [content(episode)[-1] for episode in later] != [episode[-1] for episode in expected]


def test_episodes_come_in_order_with_what_happened(pool: EnvironmentPool) -> None:
    steps: list[tuple[int, int]] = []
    collector, engine = make(pool)
    played = collector.play(
        specs(4, 3), SAMPLING, iteration=3, seed=5, max_turns=12, on_step=lambda *counts: steps.append(counts)
    )
    episodes = played.episodes
    assert [(episode.group, episode.index) for episode in episodes] == [(g, i) for g in range(4) for i in range(3)]
    assert {episode.status for episode in episodes} == {"finished", "truncated"}
    for episode in episodes:
        assert (episode.iteration, episode.context, episode.weight_version) == (3, "conversation", 7)
        assert episode.success == (episode.score == 1.0) == (episode.status == "finished")
        assert episode.reason == ("" if episode.success else "turns")
        assert sum(turn.reward for turn in episode.turns) == episode.score
        assert episode.turns[0].anchor in ("3", "4", "5")
        for turn in episode.turns:
            assert turn.valid == turn.tool_call == (turn.action is not None) == ("<action>" in turn.text)
            assert len(turn.response_ids) == len(turn.logps) == len(turn.entropies)
            assert turn.finish == ("stop" if turn.valid else "length")
    assert episodes[0].invalid < sum(episode.invalid for episode in episodes), "some response was void"
    assert steps[-1] == (12, 0)
    assert all(sum(step) == 12 for step in steps)
    sizes = [len(call) for call in engine.calls]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 12
    assert sizes[-1] < 12, "finished episodes leave the batch"
    assert len(set(engine.ended)) == 12
    seeds = [request.seed for call in engine.calls for request in call]
    assert len(set(seeds)) == len(seeds), "each response has a stream of its own"
    with pytest.raises(ValueError, match="no episode is running in slot 0"):
        pool.step({0: "down"})
    assert played.aborted == []
    assert set(played.seconds) == {"generation", "environment", "other"}
    assert all(seconds > 0 for seconds in played.seconds.values())


def test_rows_of_a_conversation_are_the_ids_the_engine_saw(pool: EnvironmentPool) -> None:
    collector, engine = make(pool)
    episode = play(collector, specs(1, 1)).episodes[0]
    [(_, row)] = samples_of(episode, np.ones(len(episode.turns)), np.ones(len(episode.turns), bool))
    last = engine.calls[-1][0]
    assert row.ids.tolist() == last.prompt_ids.tolist() + episode.turns[-1].response_ids.tolist()
    assert row.ids[row.turns == 0].tolist() == episode.turns[0].response_ids.tolist()
    assert last.sampling.stop_ids == collector.agent.stop_ids


def test_void_turn_takes_a_step_and_sends_nothing(pool: EnvironmentPool) -> None:
    collector, _ = make(pool, always("I will not"))
    episode = play(collector, specs(1, 1), max_turns=3).episodes[0]
    assert [turn.action for turn in episode.turns] == [None] * 3
    assert (episode.status, episode.reason, episode.invalid, episode.tool_calls) == ("truncated", "turns", 3, 0)
    assert episode.turns[1].observation.endswith("left after ")


def test_environment_that_cuts_an_episode(pool: EnvironmentPool) -> None:
    collector, _ = make(pool, always("<action>up</action>"))
    episode = play(collector, specs(1, 1), max_turns=50).episodes[0]
    assert (episode.status, episode.reason, episode.success) == ("truncated", "environment", False)
    assert len(episode.turns) < 12


def test_prompt_without_room_truncates(pool: EnvironmentPool) -> None:
    collector, engine = make(pool, lambda prompt, _: "<action>up</action>" if len(prompt) < 120 else None)
    episode = play(collector, specs(1, 1), max_turns=50).episodes[0]
    assert (episode.status, episode.reason) == ("truncated", "overlong")
    assert len(engine.calls) == len(episode.turns) + 1
    assert all(len(turn.response_ids) for turn in episode.turns)


def test_episode_token_limit_bounds_prompt_and_responses(pool: EnvironmentPool) -> None:
    limit = 160
    collector, engine = make(pool, always("<action>up</action> and then some more words"), max_episode_tokens=limit)
    episodes = play(collector, specs(2, 2), max_turns=50).episodes
    for episode in episodes:
        assert (episode.status, episode.reason) == ("truncated", "overlong")
        used = sum(len(turn.prompt_ids) + len(turn.response_ids) for turn in episode.turns)
        assert limit - 64 < used <= limit
    requests = [request for call in engine.calls for request in call]
    assert {request.sampling.max_new_tokens for request in requests} > {64}
    assert all(len(request.prompt_ids) + request.sampling.max_new_tokens <= limit for request in requests)


def test_turns_say_what_their_prompt_left_out(pool: EnvironmentPool) -> None:
    collector, _ = make(pool, agent=StepwiseAgent(max_prompt_tokens=400, think=False))
    played = play(collector, specs(1, 2), max_turns=4)
    # One past step fits, two do not: the third and the fourth prompt of both episodes.
    for episode in played.episodes:
        assert [turn.shortened for turn in episode.turns] == ["", "", "history", "history"]


@pytest.mark.parametrize("agent", [TranscriptAgent, StepwiseAgent])
def test_real_engine_plays_the_same_episode_in_any_company(
    pool: EnvironmentPool, tiny_policy: Callable[..., Policy], agent: type[Agent]
) -> None:
    policy = tiny_policy("qwen2")
    player = agent()
    player.bind(policy.tokenizer)
    engine = HuggingFaceEngine()
    engine.sync(policy, 1)

    def played(todo: list[EpisodeSpec], **limits: int) -> list[Episode]:
        collector = Collector(pool, player, engine, **limits)
        sampling = Sampling(max_new_tokens=6)
        return collector.play(todo, sampling, iteration=0, seed=1, max_turns=4).episodes

    todo = specs(3, 2)
    together = played(todo)
    assert len({str(content(episode)[-1]) for episode in together}) == 6
    for others in ([played([spec])[0] for spec in todo], played(todo, max_active=2)):
        for one, other in zip(together, others, strict=True):
            assert len(one.turns) == len(other.turns) == 4
            for left, right in zip(one.turns, other.turns, strict=True):
                assert left.prompt_ids.tolist() == right.prompt_ids.tolist()
                assert left.response_ids.tolist() == right.response_ids.tolist()
                assert left.observation == right.observation
                np.testing.assert_allclose(left.logps, right.logps, atol=1e-5)


class Sabotage(ScriptedEngine):
    """Breaks a worker in the middle of the play."""

    def __init__(self, pool: EnvironmentPool, at: int) -> None:
        super().__init__(byte_tokenizer(tags=True), wander)
        self.pool, self.at = pool, at

    def generate(self, requests: list[Request]) -> list[Completion]:  # type: ignore[override]
        if len(self.calls) == self.at:
            os.kill(self.pool.pids[1], signal.SIGKILL)
        return super().generate(requests)


def test_killed_worker_costs_its_episodes_only() -> None:
    todo = specs(4, 4)
    with EnvironmentPool(Tiny(), workers=2) as pool:
        expected = [content(episode) for episode in play(make(pool)[0], todo).episodes]
        collector, _ = make(pool)
        collector.engine = engine = Sabotage(pool, at=1)
        played = play(collector, todo)
        assert [4 * episode.group + episode.index for episode in played.aborted] == list(range(1, 16, 2))
        assert [content(episode) for episode in played.episodes] == expected[::2]
        for episode in played.aborted:
            assert (episode.status, episode.success) == ("aborted", False)
            assert "worker died" in episode.reason
        assert len(engine.ended) == 16
        assert [content(episode) for episode in play(make(pool)[0], todo).episodes] == expected, "pool is whole again"


@pytest.mark.parametrize("action", ["raise", "exit", "nan"])
def test_environment_that_raises_aborts_its_episode(pool: EnvironmentPool, action: str) -> None:
    collector, _ = make(pool, lambda prompt, number: f"<action>{action if 'train 1' in prompt else 'down'}</action>")
    played = play(collector, specs(3, 1))
    assert [(episode.group, episode.status) for episode in played.episodes] == [(0, "finished"), (2, "finished")]
    assert [(episode.group, episode.status) for episode in played.aborted] == [(1, "aborted")]
    assert "environment raised" in played.aborted[0].reason


def test_task_that_cannot_be_reset_is_aborted_and_its_slot_reused(pool: EnvironmentPool) -> None:
    collector, engine = make(pool, max_active=1)
    todo = [EpisodeSpec(Task("bad reset"), group, 0) for group in range(3)] + specs(1, 2)
    played = play(collector, todo)
    assert (len(played.aborted), len(played.episodes)) == (3, 2)
    assert all(len(episode.turns) == 0 for episode in played.aborted)
    assert len(set(engine.ended)) == 5


def test_nothing_to_play(pool: EnvironmentPool) -> None:
    collector, engine = make(pool)
    assert play(collector, []).episodes == []
    assert play(collector, [EpisodeSpec(Task("bad reset"), 0, 0)]).aborted[0].status == "aborted"
    assert engine.calls == []


def test_failing_engine_leaves_nothing_behind(pool: EnvironmentPool) -> None:
    def fail(prompt: str, number: float) -> str:
        raise RuntimeError("out of memory")

    collector, engine = make(pool, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        play(collector, specs(2, 2))
    assert len(engine.ended) == 4
    assert not pool.pending
    assert len(play(make(pool)[0], specs(2, 2)).episodes) == 4


def test_close_closes_pool_and_engine() -> None:
    collector, engine = make(EnvironmentPool(Tiny(), workers=1))
    play(collector, specs(1, 1))
    collector.close()
    assert engine.closed
    assert collector.pool.pids == []


def test_limits_are_checked(pool: EnvironmentPool) -> None:
    with pytest.raises(ValueError, match=r"Collector\.max_active must be at least 1"):
        make(pool, max_active=0)
    with pytest.raises(ValueError, match="max_turns must be at least 1"):
        play(make(pool)[0], specs(1, 1), max_turns=0)

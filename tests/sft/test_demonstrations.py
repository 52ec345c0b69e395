from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spear_lightning.agents.base import without_task
from spear_lightning.agents.chat import ChatAgent
from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.alfworld.generator import SceneSize
from spear_lightning.environments.alfworld.suite import ALFWorld
from spear_lightning.environments.base import Observation
from spear_lightning.environments.expert import DemonstrationNoise
from spear_lightning.sft.demonstrations import ExpertDemonstrations, Transcript
from spear_lightning.sft.tokenizer import build_tokenizer
from tests.sft.conftest import STRAYING

STRAIGHT = ExpertDemonstrations(noise=DemonstrationNoise(), repetitions=1)
ONCE = ExpertDemonstrations(noise=STRAYING, repetitions=1)
LEARN_NOISE = ExpertDemonstrations(learn_noise=True)


@pytest.fixture(scope="module")
def agent(transcripts: list[Transcript]) -> TranscriptAgent:
    agent = TranscriptAgent()
    agent.bind(build_tokenizer(text for transcript in transcripts for text in transcript.texts()))
    return agent


def test_the_expert_wins_the_real_game(suite: ALFWorld) -> None:
    played = STRAIGHT.play(suite, suite.tasks("train"), workers=0, seed=0)
    assert all(transcript.success for transcript in played)
    assert sum(transcript.refused for transcript in played) == 0


def test_the_expert_wins_although_it_strays(transcripts: list[Transcript]) -> None:
    assert sum(transcript.success for transcript in transcripts) >= 11
    motives = {step.motive for transcript in transcripts for step in transcript.steps}
    assert motives == {"purpose", "stray", "invalid"}
    invalid = sum(step.motive == "invalid" for transcript in transcripts for step in transcript.steps)
    refused = sum(transcript.refused for transcript in transcripts)
    assert invalid <= refused <= invalid + 3  # beyond its invalid actions, only putting a mistake back may be refused


def test_the_expert_reads_nothing_but_text(suite: ALFWorld) -> None:
    """Replaying the texts alone to a fresh expert gives the same actions."""
    task = suite.tasks("train")[0]
    played = ONCE.play(suite, [task], workers=0, seed=2)[0]
    again = ONCE.play(suite, [task], workers=1, seed=2)[0]
    assert again == played
    from spear_lightning.utils.randomness import stream_seed

    expert = SearchExpert(stream_seed("demonstration", 2, task.id, 0), STRAYING)
    expert.reset(str(played.instruction), str(played.steps[0].observation))
    assert [expert.act(step.observation) for step in played.steps] == [step.action for step in played.steps]


def test_samples_equal_what_the_agent_would_have_played(transcripts: list[Transcript], agent: TranscriptAgent) -> None:
    for transcript in transcripts:
        opened = Observation(transcript.steps[0].observation, task=transcript.instruction)
        player = agent.start(transcript.task, opened)
        for number, step in enumerate(transcript.steps):
            if number:
                player.observe(Observation(step.observation))
            player.prompt()
            assert player.respond(agent.response_ids(step.action)).action == step.action
        (sample,) = LEARN_NOISE.encode(transcript, agent)
        assert sample.ids.tolist() == player.prompt().ids.tolist()


def test_only_actions_are_learned(transcripts: list[Transcript], agent: TranscriptAgent) -> None:
    transcript = next(t for t in transcripts if {s.motive for s in t.steps} == {"purpose", "stray", "invalid"})
    (purpose,) = ONCE.encode(transcript, agent)
    (strayed,) = LEARN_NOISE.encode(transcript, agent)
    np.testing.assert_array_equal(purpose.ids, strayed.ids)

    def learned(row_mask: np.ndarray) -> list[str]:
        text = agent.decode(purpose.ids[row_mask])
        return [part.strip().removesuffix("</action>").strip() for part in text.split("<action>")[1:]]

    assert learned(purpose.mask) == [s.action for s in transcript.steps if s.motive == "purpose"]
    assert learned(strayed.mask) == [s.action for s in transcript.steps if s.motive != "invalid"]


@pytest.mark.parametrize(("think", "listed"), [(False, True), (True, False)])
def test_a_stepwise_agent_learns_each_move_from_its_own_prompt(
    transcripts: list[Transcript], think: bool, listed: bool
) -> None:
    agent = StepwiseAgent(history_length=2, think=think, show_admissible=listed)
    shown = replace(ONCE, agent=agent)
    tokenizer = shown.build_tokenizer(text for transcript in transcripts for text in transcript.texts())
    agent.bind(tokenizer)
    assert len(agent.encode(agent.role)) == 1, "what every prompt says is a token"
    for transcript in transcripts:
        learned = [number for number, step in enumerate(transcript.steps) if step.motive == "purpose"]
        samples = shown.encode(transcript, agent)
        assert len(samples) == len(learned)
        done = [(without_task(step.observation, transcript.instruction), step.action) for step in transcript.steps]
        for number, sample in zip(learned, samples, strict=True):
            step = transcript.steps[number]
            asked = agent.prompt_of(transcript.instruction, number, done[:number], done[number][0], step.admissible)
            assert sample.ids[~sample.mask].tolist() == asked.ids.tolist()
            response = agent.interpret(sample.ids[sample.mask], step.admissible, think=think)
            assert (response.action, response.valid) == (step.action, True)
            assert step.action in step.admissible
            assert ("- " + step.action in agent.decode(asked.ids)) == listed


def test_an_agent_that_needs_a_chat_template_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"demonstrations\.agent must be .*, not ChatAgent: .* no chat template"):
        ExpertDemonstrations(agent=ChatAgent())


def test_engine_texts_survive_the_tokenizer(transcripts: list[Transcript], agent: TranscriptAgent) -> None:
    for transcript in transcripts:
        for text in transcript.texts():
            ids = agent.encode(text)
            assert agent.decode(ids) == text.lower().removesuffix(" ")
            assert len(ids) <= len(text.split()) * 2


def test_repetitions_differ_and_workers_do_not_matter(suite: ALFWorld) -> None:
    tasks = suite.tasks("train")[:3]
    twice = ExpertDemonstrations(noise=STRAYING, repetitions=2)
    alone = twice.play(suite, tasks, workers=0, seed=1)
    shared = twice.play(suite, tasks, workers=2, seed=1)
    assert alone == shared
    assert [t.task for t in alone] == [task for task in tasks for _ in range(2)]
    assert alone[0] != replace(alone[1])


@pytest.mark.slow
def test_the_expert_wins_nine_of_ten_games_of_every_size(tmp_path: Path) -> None:
    for scene in (SceneSize((5, 9), (2, 5)), SceneSize((10, 16), (4, 10))):
        games = ALFWorld(cache_dir=str(tmp_path), train=24, validation=1, test=1, train_seed=90, scene=scene)
        games.prepare()
        played = STRAIGHT.play(games, games.tasks("train"), workers=0, seed=0)
        assert sum(transcript.success for transcript in played) >= 0.9 * len(played)

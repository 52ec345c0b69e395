"""Demonstrations of another expert in another world than ALFWorld, down to the tokens that a policy learns."""

from __future__ import annotations

import pytest

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.expert import DemonstrationNoise
from spear_lightning.environments.webshop import WebShop
from spear_lightning.environments.webshop.expert import ShoppingExpert
from spear_lightning.environments.webshop.session import parse_action
from spear_lightning.sft.demonstrations import ExpertDemonstrations, Transcript
from spear_lightning.sft.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory) -> list[Transcript]:
    cache = str(tmp_path_factory.mktemp("cache"))
    suite = WebShop(products=68, goals="synthetic", test=1, validation=1, train=40, cache_dir=cache)
    settings = ExpertDemonstrations(ShoppingExpert, repetitions=1, max_steps=15, noise=DemonstrationNoise(invalid=0.1))
    return settings.play(suite, suite.tasks("train"), workers=0, seed=0)


def test_the_named_expert_plays(transcripts: list[Transcript]) -> None:
    assert len(transcripts) == 40
    assert sum(transcript.success for transcript in transcripts) > 30
    for transcript in transcripts:
        meant = next(step.action for step in transcript.steps if step.motive == "purpose")
        assert meant.startswith("search[ ")


def test_what_is_learned_are_its_actions_in_whole_words(transcripts: list[Transcript]) -> None:
    assert ShoppingExpert.phrases != SearchExpert.phrases
    texts = (text for transcript in transcripts for text in transcript.texts())
    agent = TranscriptAgent()
    agent.bind(build_tokenizer(texts, phrases=ShoppingExpert.phrases, min_count=1))
    for transcript in transcripts[:10]:
        (sample,) = ExpertDemonstrations(learn_noise=True).encode(transcript, agent)
        purposes = [step.action for step in transcript.steps if step.motive != "invalid"]
        tokens = agent.tokenizer.convert_ids_to_tokens(sample.ids[sample.mask].tolist())
        assert tokens.count("<action>") == len(purposes)
        learned = [
            part.partition("</action>")[0] for part in agent.decode(sample.ids[sample.mask]).split("<action>")[1:]
        ]
        assert [parse_action(action) for action in learned] == [parse_action(action) for action in purposes]
        asins = [parse_action(action)[1] for action in purposes]  # type: ignore[index]
        assert all(f" {asin}" in tokens for asin in asins if len(asin) == 10 and asin.isalpha())

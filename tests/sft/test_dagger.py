from __future__ import annotations

import random

import pytest
import torch

from spear_lightning.data.samples import Sample
from spear_lightning.environments.alfworld.expert import SearchExpert
from spear_lightning.environments.alfworld.suite import ALFWorld
from spear_lightning.environments.expert import DemonstrationNoise
from spear_lightning.policy.loading import fresh_model
from spear_lightning.sft.dagger import Dagger, play_dagger
from spear_lightning.sft.demonstrations import ExpertDemonstrations, Transcript
from spear_lightning.sft.tokenizer import PreTrainedTokenizerFast, build_tokenizer

TINY = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
}


def test_the_expert_wins_although_others_move_too(suite: ALFWorld) -> None:
    """Every second move is a random admissible one that the expert did not choose."""
    environment, draw = suite.make(), random.Random(0)
    won = []
    for task in suite.tasks("train"):
        text, info = environment.reset(options={"task": task.id})
        expert = SearchExpert(1)
        expert.reset(info["task"], text)
        for step in range(49):
            action = expert.act(text)
            if step % 2:
                action = draw.choice(info["admissible_actions"])
                expert.overrule(action)
            text, _, over, _, info = environment.step(action)
            if over:
                break
        won.append(info["won"])
    environment.close()
    assert sum(won) >= 10


@pytest.fixture(scope="module")
def tokenizer(transcripts: list[Transcript]) -> PreTrainedTokenizerFast:
    return build_tokenizer(text for transcript in transcripts for text in transcript.texts())


STRAIGHT = ExpertDemonstrations(noise=DemonstrationNoise())


def played(suite: ALFWorld, tokenizer: PreTrainedTokenizerFast, share: float) -> list[Sample]:
    network = fresh_model(TINY, tokenizer, "model", dtype=torch.float32, attention="sdpa", seed=0)
    return play_dagger(
        *(network, tokenizer, suite, suite.tasks("train")[:4], Dagger(share=share, max_turns=12), STRAIGHT),
        seed=3,
        max_response_tokens=5,
        workers=1,
    )


def segments(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts of the learned runs of tokens."""
    runs: list[list[int]] = []
    for position in range(len(sample)):
        if sample.mask[position]:
            if position == 0 or not sample.mask[position - 1]:
                runs.append([])
            runs[-1].append(int(sample.ids[position]))
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.slow
def test_only_the_moves_of_the_expert_are_learned(suite: ALFWorld, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = played(suite, tokenizer, share=0.5)
    assert len(samples) == 4
    for sample in samples:
        texts = segments(sample, tokenizer)
        assert all(text.startswith("<action> ") and text.endswith(" </action>") for text in texts)
        # An untrained policy writes no action, so only the expert's turns close one.
        assert len(texts) == tokenizer.decode(sample.ids).count("</action>")
        assert len(texts) < 12


@pytest.mark.slow
def test_an_expert_that_makes_every_move_is_a_demonstration(
    suite: ALFWorld, tokenizer: PreTrainedTokenizerFast
) -> None:
    from spear_lightning.agents.transcript import TranscriptAgent
    from spear_lightning.sft.demonstrations import play_transcript
    from spear_lightning.utils.randomness import stream_seed

    agent = TranscriptAgent()
    agent.bind(tokenizer)
    environment = suite.make()
    for task, sample in zip(suite.tasks("train")[:4], played(suite, tokenizer, share=1.0), strict=True):
        expert = SearchExpert(stream_seed("coach", 3, task.id))
        (demonstration,) = STRAIGHT.encode(play_transcript(environment, task, expert, 12), agent)
        assert sample.ids.tolist() == demonstration.ids.tolist()
        assert sample.mask.tolist() == demonstration.mask.tolist()
    environment.close()


@pytest.mark.parametrize("change", [{"share": 0.0}, {"rounds": -1}, {"epochs": 0}, {"max_turns": 5000}])
def test_settings_out_of_range_are_named(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"Dagger\.{next(iter(change))} must be"):
        Dagger(**change)  # type: ignore[arg-type]

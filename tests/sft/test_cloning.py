from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from spear_lightning.data.samples import Sample
from spear_lightning.policy.loading import fresh_model
from spear_lightning.sft.initialization import compose_name_embeddings
from spear_lightning.sft.module import CloningModule, LengthBatches, Optimization, collate, sample_of
from spear_lightning.sft.tokenizer import build_tokenizer

TINY = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
}
TEXTS = ["take the mug 1 from desk 2", "put a mug in desk", "desk mug"]


def model() -> PreTrainedModel:
    return fresh_model(TINY, build_tokenizer(TEXTS), "model", dtype=torch.float32, attention="sdpa", seed=0)


def samples(count: int = 20) -> list[Sample]:
    random = np.random.default_rng(0)
    return [
        sample_of(zip(random.integers(3, 200, (length, 1)), random.random(length) < 0.4, strict=True))
        for length in random.integers(4, 30, count)
    ]


def test_padding_changes_nothing() -> None:
    module = CloningModule(model())
    some = samples(4)
    together, _ = module._losses(collate(some), "")
    alone = [module._losses(collate([row]), "")[0] for row in some]
    counts = [int(row.mask[1:].sum()) for row in some]
    torch.testing.assert_close(together, sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts))


def test_the_loss_is_that_of_the_action_tokens_only() -> None:
    module = CloningModule(model())
    batch = collate(samples(3))
    logits = module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    expected = [
        -logits[row, token - 1, batch.input_ids[row, token]]
        for row in range(3)
        for token in range(1, batch.input_ids.shape[1])
        if batch.response_mask[row, token]
    ]
    torch.testing.assert_close(module._losses(batch, "")[0], torch.stack(expected).mean())


def test_the_weight_of_observations_counts() -> None:
    batch = collate(samples(3))
    values = []
    for weight in (0.0, 0.5):
        module = CloningModule(model(), Optimization(observation_weight=weight))
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        values.append(module.training_step(batch, 0))
    torch.testing.assert_close(values[1] - values[0], 0.5 * module._losses(batch, "")[1])


def test_batches_hold_every_sample_once_and_change_by_epoch() -> None:
    lengths = [len(sample) for sample in samples(37)]
    batches = LengthBatches(lengths, 4, seed=3)
    first, second = list(batches), list(batches)
    assert sorted(i for batch in first for i in batch) == list(range(37))
    assert len(first) == len(batches) == 10
    assert first != second
    assert first == list(LengthBatches(lengths, 4, seed=3))
    assert first != list(LengthBatches(lengths, 4, seed=4))


def test_names_begin_alike_where_nouns_are_alike() -> None:
    tokenizer = build_tokenizer(TEXTS)
    wide = {**TINY, "hidden_size": 256}
    network = fresh_model(wide, tokenizer, "model", dtype=torch.float32, attention="sdpa", seed=0)
    assert compose_name_embeddings(network, tokenizer) == 3  # mug 1, desk 1, desk 2
    weight, vocabulary = network.get_input_embeddings().weight.detach(), tokenizer.get_vocab()

    def alike(one: str, other: str) -> float:
        return float(torch.cosine_similarity(weight[vocabulary[one]], weight[vocabulary[other]], dim=0))

    assert alike(" mug", " mug 1") > 0.4 > alike(" desk", " mug 1")


@pytest.mark.parametrize("key", ["learning_rate", "batch_size", "epochs", "max_grad_norm"])
def test_settings_out_of_range_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=rf"Optimization\.{key} must be"):
        Optimization(**{key: 0})

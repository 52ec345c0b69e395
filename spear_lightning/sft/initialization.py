"""Initial embeddings of names, composed of those of their parts."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r" ([a-z]+) (\d+)")
_OWN_SHARE = 0.5  # of the name's own random embedding in the mixture, which tells it from its parts


@torch.no_grad()
def compose_name_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Start the embedding of each name ("desk 1") as the mixture of its noun's and its number's.

    To take the right thing, a policy must see that ``mug 2`` in a room is the ``mug`` of its task. Random embeddings of
    the two have nothing in common, and demonstrations show each pair only a few times; composed embeddings make all
    such pairs look alike from the start.

    Args:
        model: with freshly drawn embeddings; changed in place.
        tokenizer: whose names are to be composed.

    Returns:
        How many embeddings were composed.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    weight, vocabulary = embedding.weight, tokenizer.get_vocab()
    composed = 0
    for token, index in vocabulary.items():
        found = _NAME.fullmatch(token)
        if not found:
            continue
        parts = [vocabulary.get(f" {part}") for part in found.groups()]
        if None in parts:
            continue
        weight[index] = weight[parts].sum(0) * 0.5**0.5 + _OWN_SHARE * weight[index]
        composed += 1
    return composed

"""The shape of a language model, and the operations that an update on it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only language model that memory and cost depend on.

    Attributes:
        parameters: Ψ, tied ones once, adapters included.
        trainable: Ψₜ, those that get a gradient.
        largest: parameters of the largest single module (an embedding, as a rule).
        layers: L.
        hidden: h, width of the residual stream.
        intermediate: f, width of the MLP.
        queries: q, query heads times their size.
        keys: k, key-value heads times their size.
        heads: query heads.
        vocabulary: V.
    """

    parameters: int
    trainable: int
    largest: int
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    vocabulary: int

    @property
    def head_trained(self) -> bool:
        """Whether the output head gets a gradient (with adapters it does not)."""
        return self.trainable == self.parameters


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model itself, without the wrapper that adapters put around it."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]


def shape_of(model: nn.Module) -> ModelShape:
    """The shape of a Hugging Face causal language model, with or without adapters around it."""
    causal = causal_lm(model)
    settings = causal.config.get_text_config()
    heads = settings.num_attention_heads
    size = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        largest=max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()),
        layers=settings.num_hidden_layers,
        hidden=settings.hidden_size,
        intermediate=getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size,
        queries=heads * size,
        keys=(getattr(settings, "num_key_value_heads", None) or heads) * size,
        heads=heads,
        vocabulary=settings.vocab_size,
    )


def linear_weights(model: nn.Module) -> int:
    """Weights of all linear layers but the output head."""
    head = causal_lm(model).get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(layer.weight.numel() for layer in layers)


def model_flops(model: ModelShape, matrices: int, tokens: float, squares: float, predicted: float) -> float:
    """Operations that an update's forward and backward pass need, whatever is computed beside them.

    A multiplication and an addition are two. No layer is counted twice, and no padding, no token that a causal mask
    hides, no logits of tokens that carry no loss: 6 for each weight and token, and in each layer ``12 q`` for each pair
    of tokens of which the later one sees the other (half of a sequence's length squared).

    Args:
        model: its shape.
        matrices: weights of the linear layers, without the output head's.
        tokens: of all sequences.
        squares: sum of the squared lengths of the sequences.
        predicted: tokens that carry a loss.
    """
    trained = matrices if model.head_trained else model.trainable
    head = (6 if model.head_trained else 4) * model.vocabulary * model.hidden
    return tokens * (4 * matrices + 2 * trained) + 6 * model.layers * model.queries * squares + predicted * head

"""What training computes, sends and writes: floating-point operations and bytes.

Measured against counters by ``memory.py``; the notation is that of :mod:`spear_lightning.planning.memory`.
"""

from __future__ import annotations

from spear_lightning.planning.memory import REPLAY_TOKEN
from spear_lightning.planning.shape import Layout, Numbers
from spear_lightning.policy.flops import ModelShape


def update_flops(model: ModelShape, matrices: int, tokens: int, length: int, checkpointing: bool) -> float:
    """Operations of a forward and backward pass, a multiplication and an addition counted as two.

    Each weight of a matrix costs 2 forward and 4 backward (Kaplan et al., arXiv 2001.08361, §2.1), 2 of these for its
    own gradient, which frozen weights are spared; and 2 more where its layer is recomputed. The chunked output head
    always is. Attention multiplies two ``length × q`` matrices a layer: ``4 q length`` a token forward and twice that
    backward, counted whole although a causal kernel may skip half of it.

    Args:
        model: its shape.
        matrices: weights of the linear layers, without the output head's.
        tokens: that pass through, padding included.
        length: of a row.
        checkpointing: layers are recomputed in the backward pass.
    """
    attention = 4 * model.layers * model.queries * length
    trained = matrices if model.head_trained else model.trainable
    layers = (3 if checkpointing else 2) * (2 * matrices + attention) + 2 * trained + attention
    head = (4 if model.head_trained else 3) * 2 * model.vocabulary * model.hidden
    return float(tokens) * (layers + head)


def update_messages(model: ModelShape, numbers: Numbers, layout: Layout, micro_batches: int) -> int:
    """Bytes of one update's collective operations on each rank; a ring sends ``(N - 1) / N`` of them.

    An all-reduce counts twice. With g gradient bytes and w weight bytes of the whole model and m micro-batches: DDP
    ``2 g``; ZeRO-1 ``2 g + w``; ZeRO-2 ``2 g m + w``, because DeepSpeed reduces after every micro-batch, and by
    all-reduce (``use_multi_rank_bucket_allreduce``); ZeRO-3 ``(2 w + g) m``: parameters are gathered for the forward
    and again for the backward pass (only once if they all fit into ``stage3_max_live_parameters``).
    """
    if layout.ranks == 1:
        return 0
    gradients, weights = numbers.weight * model.trainable, numbers.weight * model.parameters
    if layout.parameters > 1:
        return micro_batches * (2 * weights + gradients)
    reductions = micro_batches if layout.gradients > 1 else 1
    return reductions * 2 * gradients + (numbers.weight * model.trainable if layout.optimizer > 1 else 0)


def replica_messages(model: ModelShape, numbers: Numbers, layout: Layout) -> int:
    """Bytes gathered on each rank before a rollout phase: the whole policy under ZeRO-3, else nothing."""
    return numbers.weight * model.parameters if layout.stage == 3 else 0


def checkpoint_bytes(model: ModelShape, numbers: Numbers, layout: Layout, replay_tokens: int = 0) -> int:
    """Of all ranks together: weights, master weights, optimizer state, replay. ZeRO-3 writes the masters alone."""
    trained = int((numbers.master + numbers.state) * model.trainable)
    weights = numbers.weight * model.parameters if layout.parameters == 1 else 0
    return weights + trained + REPLAY_TOKEN * replay_tokens

"""The policy: a Hugging Face causal language model and its tokenizer, seen as a distribution over token sequences."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spear_lightning.policy.attention import pack_model
from spear_lightning.policy.flops import causal_lm
from spear_lightning.policy.kernels import compiled_base, fuse_kernels
from spear_lightning.policy.loading import check_vocabulary, fresh_model, load_model, load_tokenizer, tokenizer_hash
from spear_lightning.policy.logprobs import (
    CHUNK_BYTES,
    ChunkedHead,
    checkpointed_stats_of_logits,
    chunk_tokens,
)
from spear_lightning.policy.lora import LoRA, with_adapters
from spear_lightning.policy.packing import Layout, pack_rows
from spear_lightning.utils.ranges import Positive, in_range

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What ``policy.dtype`` may be."""


class TokenStats(NamedTuple):
    """Log-probability and entropy of each token of a batch.

    Attributes:
        logps: log-probability of the token given those before it, in nats, ``(rows, tokens)``; 0 where not computed.
        entropies: entropy of the distribution the token is drawn from, in nats, ``(rows, tokens)``; 0 where not
            computed.
    """

    logps: Tensor
    entropies: Tensor


@in_range
class Policy(nn.Module):
    """A causal language model, for training and for generation.

    Token log-probabilities are computed in chunks over tokens, so that (tokens × vocabulary) is never held, if the
    model's output head is a plain matrix product; this is tried out once, at construction. For other heads
    (soft-capped or scaled logits, an adapted head) the model's own logits are used: they are held for the columns of
    the loss mask, and their softmax is recomputed in the backward pass.

    Args:
        model: folder or Hugging Face hub id of the model, or ``"embedded"``: the small one that ships with the package.
        config: settings of a fresh model with random weights instead: ``model_type`` and keys of that type's Hugging
            Face configuration, for example ``{model_type: qwen2, hidden_size: 128, num_hidden_layers: 2}``.
        tokenizer: folder or hub id; by default the model's own.
        dtype: of the weights.
        attention: Hugging Face attention implementation (``sdpa``, ``eager``, ``flash_attention_2``, …).
        gradient_checkpointing: recompute the layers in the backward pass: less memory, a third more computation.
        lora: train low-rank adapters instead of all weights.
        layout: how a batch's rows go through the model, with the same results: ``padded`` to the length of the longest;
            ``packed`` end to end, without padding; ``shared``: packed, and what rows begin with in common is computed
            once (:mod:`spear_lightning.policy.packing`). The last two need ``sdpa``.
        compile: compile the layers with ``torch.compile`` for training; generation stays as it is.
        fused_kernels: Liger's Triton kernels for norms, rotary embeddings and activations (a GPU and the package
            ``liger-kernel``).
        seed: of fresh weights and adapters.
        chunk_bytes: bound on the memory of one chunk of the output head's temporaries.

    Raises:
        ValueError: a name or setting cannot be used; the message names the key and the fix.

    Attributes:
        tokenizer: of the model; has an end-of-sequence and a padding token.
        model: the Hugging Face model, inside its adapters if there are any.
        chunked: whether the output head is a plain matrix product, so that logits are never held.
    """

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        seed: int = 0,
        chunk_bytes: Positive = CHUNK_BYTES,
        layout: Layout = "padded",
        compile: bool = False,
        fused_kernels: bool = False,
    ) -> None:
        super().__init__()
        if (model is None) == (config is None):
            raise ValueError("policy: give either policy.model (a folder or hub id) or policy.config (a fresh model)")
        self.lora, self.layout = lora, layout
        options: dict[str, Any] = {"dtype": DTYPES[dtype], "attention": attention}
        if model is not None:
            self.tokenizer = load_tokenizer(tokenizer or model, "policy.tokenizer" if tokenizer else "policy.model")
            causal: Any = load_model(model, "policy.model", **options)
        else:
            if tokenizer is None:
                raise ValueError("policy.tokenizer: a fresh model (policy.config) needs a tokenizer folder or hub id")
            assert config is not None
            self.tokenizer = load_tokenizer(tokenizer, "policy.tokenizer")
            causal = fresh_model(config, self.tokenizer, "policy.config", seed=seed, **options)
        check_vocabulary(causal, self.tokenizer, "policy.tokenizer" if tokenizer else "policy.model")
        if gradient_checkpointing:
            if not causal.supports_gradient_checkpointing:
                raise ValueError(f"policy.gradient_checkpointing: {type(causal).__name__} does not support it")
            causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if fused_kernels:
            fuse_kernels(causal)
        self.model: nn.Module = causal if lora is None else with_adapters(causal, lora, seed)
        self.chunked = _has_plain_head(causal, attention)
        if self.chunked:
            causal.set_output_embeddings(ChunkedHead.sharing(causal.get_output_embeddings()))
        if layout != "padded":
            if lora is not None and lora.dropout and layout == "shared":
                raise ValueError("policy.layout: shared would give rows the same policy.lora.dropout: set that to 0")
            pack_model(causal, attention)
        # a tuple: not a module of the policy's own
        self._compiled = (compiled_base(causal, layout),) if compile else None
        self._keeps_logits = "logits_to_keep" in inspect.signature(causal.forward).parameters
        self._chunk_size = chunk_tokens(causal.config.get_text_config().vocab_size, chunk_bytes)
        # Gradient checkpointing and LoRA's dropout work in training mode only, and a loaded model comes in evaluation
        # mode. There is no other dropout (see loading), so the mode makes no other difference.
        self.train()

    @property
    def causal_lm(self) -> Any:
        """The ``PreTrainedModel`` itself, without the wrapper that adapters put around it (they stay at work)."""
        return causal_lm(self.model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        temperature: float = 1.0,
        *,
        loss_mask: Tensor | None = None,
    ) -> TokenStats:
        """Log-probability and entropy of tokens at a temperature.

        Args:
            input_ids: token ids, integers ``(rows, tokens)``.
            attention_mask: 1 at tokens, 0 at padding, ``(rows, tokens)``; padding on the right is cheapest.
            temperature: logits are divided by it; above 0.
            loss_mask: 1 where the results are needed, ``(rows, tokens)``; by default at every token. The output head is
                computed only there.

        Returns:
            Both results aligned with ``input_ids``: entry ``[i, t]`` is about token ``t``, predicted from the tokens
            before it. Position 0, padding and masked tokens are exactly 0, with zero gradient.

        Raises:
            ValueError: the temperature is not above 0.
        """
        mask = attention_mask.bool()
        wanted = mask if loss_mask is None else mask & loss_mask.bool()
        # Token t is predicted at position t - 1.
        rows, columns = wanted[:, 1:].nonzero(as_tuple=True)
        targets = input_ids[rows, columns + 1].long()
        place, shape = (rows, columns + 1), input_ids.shape
        if self.layout == "padded":
            inputs = self._inputs_of(mask)
        else:
            packed = pack_rows(input_ids, mask, share=self.layout == "shared")
            rows, columns = torch.zeros_like(rows), packed.places[rows, columns]
            input_ids, inputs = packed.input_ids, packed.inputs
        logps, entropies = self._stats(input_ids, inputs, rows, columns, targets, temperature)
        empty = logps.new_zeros(shape)
        return TokenStats(empty.index_put(place, logps), empty.index_put(place, entropies))

    def next_token_logits(self, input_ids: Tensor, last: Tensor, **inputs: Any) -> Tensor:
        """Logits of the token that follows, for generation.

        Args:
            input_ids: token ids, ``(rows, tokens)``.
            last: index of each row's last token within ``input_ids``, ``(rows,)``.
            inputs: further inputs of the model (mask, positions, cache).

        Returns:
            Logits at temperature 1, ``(rows, vocabulary)``, in the model's precision.
        """
        rows = torch.arange(len(last), device=last.device)
        if self.chunked:
            hidden = self.causal_lm.base_model(input_ids=input_ids, **inputs).last_hidden_state
            logits: Tensor = self._head(hidden[rows, last])
            return logits
        columns, index = torch.unique(last, return_inverse=True)
        return self._own_logits(input_ids, columns, inputs)[rows, index]

    def save_pretrained(self, folder: str | Path, *, merge_lora: bool = False) -> None:
        """Write a Hugging Face folder with the model and its tokenizer.

        Args:
            folder: to write to; made if missing.
            merge_lora: add the adapters to the weights, so that the folder is a model like any other. Otherwise only
                the adapters are written. Without LoRA there is no difference.
        """
        model: Any = self.model
        if self.lora is not None and merge_lora:
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _apply(self, fn: Any, recurse: bool = True) -> Policy:
        """Move or convert the weights, but never round the buffers.

        A model keeps its rotary frequencies as float32 buffers whatever the precision of its weights. ``bf16-true``
        casts a module as a whole, and frequencies in bfloat16 are off by a radian after a few hundred tokens.
        """
        held = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in held:
            moved = module.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(module, name, buffer.to(moved.device))
        return self

    def fingerprint(self) -> dict[str, str | int]:
        """Architecture, sizes and tokenizer, by which a checkpoint of another model is refused."""
        config = self.causal_lm.config.get_text_config()
        return {
            "architecture": type(self.causal_lm).__name__,
            "vocabulary": int(config.vocab_size),
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters()),  # partitioned under ZeRO-3
            "tokenizer": tokenizer_hash(self.tokenizer),
        }

    @property
    def _head(self) -> Any:
        return self.causal_lm.get_output_embeddings()

    def _inputs_of(self, mask: Tensor) -> dict[str, Any]:
        """What a batch needs beyond its ids.

        Padding on the right needs nothing: a causal model's tokens never see what comes after them. Sparing the mask
        lets attention take its fast causal path.
        """
        if bool((mask[:, 1:] <= mask[:, :-1]).all()):
            return {}
        return {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    def _stats(
        self,
        input_ids: Tensor,
        inputs: Mapping[str, Any],
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of ``targets``, each predicted at ``(row, column)``."""
        if self.chunked:
            base = self.causal_lm.base_model if self._compiled is None else self._compiled[0]
            hidden = base(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
            stats: tuple[Tensor, Tensor] = self._head(hidden[rows, columns], targets, temperature, self._chunk_size)
            return stats
        kept, index = torch.unique(columns, return_inverse=True)
        if not len(kept):  # nothing is wanted: one column keeps the graph connected
            kept = columns.new_zeros(1)
        logits = self._own_logits(input_ids, kept, {"use_cache": False, **inputs})[rows, index]
        return checkpointed_stats_of_logits(logits, targets, temperature, self._chunk_size)

    def _own_logits(self, input_ids: Tensor, columns: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The model's own logits at ``columns``, ``(rows, columns, vocabulary)``."""
        if self._keeps_logits:
            logits: Tensor = self.causal_lm(input_ids=input_ids, logits_to_keep=columns, **inputs).logits
        else:
            logits = self.causal_lm(input_ids=input_ids, **inputs).logits[:, columns]
        return logits


class Reference(nn.Module):
    """A policy as it was, frozen: called like a :class:`Policy`, never trained, never stored in a checkpoint.

    It is made anew from the policy's start on resume. With LoRA it is the live policy without its adapters and costs no
    memory, otherwise a copy. The policy is kept out of the module tree (parameters, state dict, training mode), but
    moves between devices with it.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._adapted = policy.lora is not None
        self._held = (policy if self._adapted else copy.deepcopy(policy).requires_grad_(False).eval(),)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0, *, loss_mask: Tensor | None = None
    ) -> TokenStats:
        """As :class:`Policy`, without gradient."""
        policy: Any = self._held[0]
        adapters_off = policy.model.disable_adapter() if self._adapted else nullcontext()
        with torch.no_grad(), adapters_off:
            stats: TokenStats = policy(input_ids, attention_mask, temperature, loss_mask=loss_mask)
        return stats

    def _apply(self, fn: Any, recurse: bool = True) -> Reference:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self._adapted:
            self._held[0]._apply(fn, recurse)
        return self


@torch.no_grad()
def _has_plain_head(causal: Any, attention: str) -> bool:
    """Whether the model's logits are nothing but ``W h + b`` of its last hidden state.

    This is tried out on two tokens rather than read off the configuration, whose keys for it differ between
    architectures. The hidden states are made a hundred times larger on the way into the head, where no soft cap passes
    for the identity.
    """
    head = causal.get_output_embeddings()
    # Weights that are not there (partitioned by ZeRO-3, on the meta device) cannot be tried out.
    if type(head) is not nn.Linear or any(p.is_meta or hasattr(p, "ds_id") for p in causal.parameters()):
        return False
    seen: list[Tensor] = []

    def enlarge(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0] * 100, *inputs[1:])

    ids = torch.arange(2, device=head.weight.device)[None] + len(head.weight) // 2
    training = causal.training
    causal.eval()
    hook = head.register_forward_pre_hook(enlarge)
    try:
        logits = causal(input_ids=ids, use_cache=False).logits
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
    except ValueError as error:
        raise ValueError(f"policy.attention: {attention} does not run this model: {error}") from error
    finally:
        hook.remove()
        causal.train(training)
    expected = head(hidden * 100).to(logits.dtype)
    told = len(seen) == 1 and torch.equal(seen[0], hidden) and bool(expected.any())
    return told and torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

"""Hugging Face tokenizers and causal language models, loaded or made, with errors that name the key to change."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

EMBEDDED = "embedded"
"""Names the small policy that ships with the package (the quickstart's start)."""

_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)


def locate(name: str, key: str) -> str:
    """Turn a model's or tokenizer's name into what Hugging Face loads.

    Args:
        name: a folder, a hub id, or ``"embedded"``.
        key: the configuration key it came from, for messages.

    Returns:
        An existing folder, or the hub id unchanged.

    Raises:
        ValueError: the folder does not exist or holds no model.
    """
    if name == EMBEDDED:
        folder = Path(str(resources.files("spear_lightning.policy") / "embedded"))
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{key}: the embedded policy is not part of this installation; make one with `spear sft` and "
                f"name its folder in {key}"
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{key}: {name} holds only LoRA adapters; save it with the adapters merged and name that folder"
            )
        if not ((folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file()):
            raise ValueError(f"{key}: {name} is not a Hugging Face model folder (no config.json in it)")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ValueError(f"{key}: there is no folder {name!r}")
    return name


def load_tokenizer(name: str, key: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and check that it can end and pad a sequence.

    Args:
        name: a folder, a hub id, or ``"embedded"``.
        key: the configuration key it came from, for messages.

    Raises:
        ValueError: it cannot be found or read, or has no end-of-sequence token.
    """
    source = locate(name, key)
    with _explained(name, source, key):
        loader: Any = PreTrainedTokenizerFast if _is_generic(Path(source)) else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(source)
    if not len(tokenizer):
        raise ValueError(f"{key}: the tokenizer in {name} has an empty vocabulary")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{key}: the tokenizer in {name} has no end-of-sequence token (eos_token), so no response could end; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, key: str, *, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Load a causal language model with all of its weights; dropout is taken out of it.

    Args:
        name: a folder, a hub id, or ``"embedded"``.
        key: the configuration key it came from, for messages.
        dtype: of the weights.
        attention: Hugging Face attention implementation.

    Raises:
        ValueError: it cannot be found or read, is no causal language model, or lacks weights.
    """
    source = locate(name, key)
    with _explained(name, source, key):
        config = AutoConfig.from_pretrained(source)
        _without_dropout(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # Hugging Face fills such holes with random numbers and a warning.
        raise ValueError(f"{key}: {name} lacks {len(missing)} weights of its architecture, for example {missing[0]}")
    assert isinstance(model, PreTrainedModel)
    return model


def empty_model(name: str, key: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """The modules of a model without its weights, on the meta device: only ``config.json`` is read.

    Args:
        name: a folder, a hub id, or ``"embedded"``.
        key: the configuration key it came from, for messages.
        dtype: of the weights.

    Raises:
        ValueError: the configuration cannot be found or read, or is not that of a causal language model.
    """
    source = locate(name, key)
    with _explained(name, source, key), torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def fresh_model(
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    *,
    dtype: torch.dtype,
    attention: str,
    seed: int,
) -> PreTrainedModel:
    """A causal language model with random weights.

    Args:
        settings: ``model_type`` and any keys of that type's Hugging Face configuration; ``vocab_size`` and the special
            token ids default to the tokenizer's.
        tokenizer: that the model is for.
        key: the configuration key the settings came from, for messages.
        dtype: of the weights.
        attention: Hugging Face attention implementation.
        seed: of the weights.

    Raises:
        ValueError: a key or value is unknown to the model type; the message names it.
    """
    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str):
        raise ValueError(f'{key}: needs "model_type", a Hugging Face architecture such as qwen2 or llama')
    try:
        known = AutoConfig.for_model(kind)
    except ValueError as error:
        raise ValueError(f"{key}.model_type: Hugging Face transformers knows no model type {kind!r}") from error
    allowed = set(known.to_dict()) | set(known.attribute_map) | {"rope_theta", "rope_scaling"}
    for name in settings:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{key}.{name}: not a setting of the model type {kind}{hint}")
    settings.setdefault("vocab_size", len(tokenizer))
    settings.setdefault("eos_token_id", tokenizer.eos_token_id)
    settings.setdefault("bos_token_id", tokenizer.bos_token_id)
    # The row of the padding token gets no gradient: it must not be that of the token that ends responses.
    padding = tokenizer.pad_token_id
    settings.setdefault("pad_token_id", None if padding == tokenizer.eos_token_id else padding)
    try:
        config = AutoConfig.for_model(kind, **settings)
        _without_dropout(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            auto: Any = AutoModelForCausalLM
            model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    except (*_LOADING_ERRORS, StrictDataclassError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"{key}: no {kind} model can be made from these settings: {_summary(error)}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raise ``ValueError`` if the tokenizer knows more tokens than the model has embeddings for."""
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else model.config.vocab_size
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"{key}: the tokenizer has token ids up to {highest}, but the model's vocabulary has only {rows} entries; "
            "they do not belong together (or vocab_size is set too small)"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hexadecimal digits that depend on every token and its id."""
    text = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_generic(folder: Path) -> bool:
    """Whether a folder's tokenizer says that it is all in ``tokenizer.json``.

    ``AutoTokenizer`` of transformers 5 does not believe it beside some models: next to a Qwen2 it puts Qwen2's
    splitting rules in place of the tokenizer's own, and every token comes out wrong.
    """
    settings = folder / "tokenizer_config.json"
    if not (settings.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    return json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") in generic


def _without_dropout(config: PreTrainedConfig) -> None:
    """Switch off whatever makes a forward pass in training mode random.

    The importance ratio compares two evaluations of the same policy: with dropout it would differ from 1 before the
    first update already. Taking it out of the configuration leaves the mode free for what depends on it (gradient
    checkpointing, LoRA's own dropout).
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _without_dropout(value)
        elif (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and name.endswith(("dropout", "pdrop", "layerdrop", "drop_rate", "jitter", "jitter_noise", "dropout_prob"))
        ):
            setattr(config, name, 0.0)


@contextmanager
def _explained(name: str, source: str, key: str) -> Iterator[None]:
    """One message for the many ways in which loading can fail."""
    try:
        yield
    except (*_LOADING_ERRORS, StrictDataclassError) as error:
        if Path(source).is_dir():
            raise ValueError(f"{key}: cannot load {name}: {_summary(error)}") from error
        raise ValueError(
            f"{key}: there is no folder {name!r}, and it could not be fetched as a Hugging Face hub id either (that "
            f"needs network, or the model in the local cache): {_summary(error)}"
        ) from error


def _summary(error: BaseException) -> str:
    """The first line or two of a message that may be pages long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else text[:237] + "..."

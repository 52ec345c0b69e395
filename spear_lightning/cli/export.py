"""``spear export``: a checkpoint becomes a Hugging Face folder that any program loads.

    spear export runs/quickstart/checkpoints/last.ckpt exported

Works for single files and for the directories that ZeRO writes, whatever their number of ranks; nothing is trained and
no process group is needed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from spear_lightning.checkpoint.manifest import MANIFEST, STATE, load_complete
from spear_lightning.distributed.zero import UNIVERSAL
from spear_lightning.planning.layouts import made
from spear_lightning.policy.policy import Policy
from spear_lightning.utils.atomic import write_atomically

_PREFIX = "policy."

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [spear-lightning]
---
# {name}

A policy trained with spear-lightning and exported by `spear export`.

- Start: {start}
- Checkpoint: {checkpoint}, after {iterations} iterations
- LoRA: {lora}

The configuration of its run:

```yaml
{config}```
"""


def export_checkpoint(checkpoint: str, folder: str, config: str | None = None, merge_lora: bool = False) -> Path:
    """Write the policy of a checkpoint as a Hugging Face folder: weights, tokenizer, chat template and a model card.

    Args:
        checkpoint: file, or directory of shards, that ``spear fit`` has written.
        folder: to write to; made if missing.
        config: composed configuration of the run; by default the ``config.yaml`` nearest above the checkpoint.
        merge_lora: add LoRA adapters to the weights. Otherwise only the adapters are written.

    Returns:
        The folder.

    Raises:
        ValueError: a file is missing or damaged, or checkpoint and configuration do not belong together; the message
            names the file and the fix.
    """
    source = Path(checkpoint).expanduser()
    if not source.exists():
        raise ValueError(f"there is no checkpoint {checkpoint}")
    name, iterations = source.name, ""
    if (source / MANIFEST).exists():
        iterations = str(load_complete(source, hashes=True).iteration)
        source = source / STATE
    settings_file = Path(config).expanduser() if config else _nearest_config(source)
    settings = _read_settings(settings_file)
    weights, counted = _read_weights(source)
    policy: Policy = made(f"model.policy of {settings_file}", Policy, settings["model"]["policy"])
    _load(policy, weights, source, settings_file)
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(target, merge_lora=merge_lora)
    adapters = "none" if policy.lora is None else "merged" if merge_lora else "adapters only, beside their base model"
    start = settings["model"]["policy"]
    start = start.get("init_args", start)  # with or without a class path
    card = _CARD.format(
        name=target.name,
        start=start.get("model") or "random weights",
        checkpoint=name,
        iterations=iterations or counted,
        lora=adapters,
        config=yaml.safe_dump(settings, sort_keys=False),
    )
    write_atomically(target / "README.md", card)
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the export.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parser = ArgumentParser(prog="spear export", description="Turn a checkpoint into a Hugging Face folder.")
    parser.add_function_arguments(export_checkpoint, as_positional=True)
    settings = parser.parse_args(None if arguments is None else list(arguments))
    print(f"written to {export_checkpoint(**settings.as_dict())}")


def _nearest_config(checkpoint: Path) -> Path:
    above = (folder / "config.yaml" for folder in checkpoint.resolve().parents)
    found = next((path for path in above if path.is_file()), None)
    if found is None:
        raise ValueError(f"there is no config.yaml above {checkpoint}: give that of its run with --config")
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings["model"]["policy"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not the configuration of a run (it has no model.policy): give --config") from error
    return settings


def _read_weights(checkpoint: Path) -> tuple[Mapping[str, Tensor], str]:
    """The policy's weights by their name in it, and for how many iterations they were trained."""
    epoch: Any
    try:
        if checkpoint.is_dir():
            state, epoch = _read_directory(checkpoint), None
        else:
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
            state, epoch = content["state_dict"], content.get("epoch")
    except Exception as error:  # whatever a damaged file makes its readers raise
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint of spear fit: {error}") from error
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    if not weights:
        raise ValueError(f"{checkpoint} holds no policy: give a checkpoint that spear fit has written")
    return weights, "an unknown number of" if epoch is None else str(epoch + 1)


def _read_directory(checkpoint: Path) -> Mapping[str, Tensor]:
    """The weights in a directory that DeepSpeed has written, joined where they are partitioned."""
    if (checkpoint / UNIVERSAL).exists():
        parameters = checkpoint / (checkpoint / UNIVERSAL).read_text(encoding="utf-8").strip() / "zero"
        files = {path.parent.name: path for path in sorted(parameters.glob("*/fp32.pt"))}
        contents = {name: torch.load(path, weights_only=True) for name, path in files.items()}
        return {name: found["param"] if isinstance(found, dict) else found for name, found in contents.items()}
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    if not list((checkpoint / tag).glob("*optim_states.pt")):  # nothing is partitioned
        whole: dict[str, Tensor] = torch.load(
            checkpoint / tag / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False
        )["module"]
        return whole
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it reports each shard
        joined: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=tag)
    return joined


def _load(policy: Policy, weights: Mapping[str, Tensor], checkpoint: Path, settings: Path) -> None:
    own = policy.state_dict()
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    weights = {  # partitions are joined flat
        name: tensor.view(own[name].shape) if name in own and tensor.shape == (own[name].numel(),) else tensor
        for name, tensor in weights.items()
    }
    shapes = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
    unknown = [name for name in weights if name not in own]
    # Tied weights are stored once, under either name; what is frozen need not be stored, it is as it was at the start.
    stored = {own[name].data_ptr() for name in weights if name in own}
    there = weights.keys() | frozen
    missing = [name for name, tensor in own.items() if name not in there and tensor.data_ptr() not in stored]
    if shapes or unknown or missing:
        first = (shapes or unknown or missing)[0]
        what = "has another shape" if shapes else "is not in the model" if unknown else "is not in the checkpoint"
        raise ValueError(f"{checkpoint} is not a checkpoint of the model in {settings}: {first} {what}; give --config")
    policy.load_state_dict(weights, strict=False)

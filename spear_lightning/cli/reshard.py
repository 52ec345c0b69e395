"""``spear reshard``: a checkpoint that ZeRO has written with some ranks becomes one for any number of ranks.

    spear reshard runs/mine/checkpoints/iteration-00012
    spear fit … --trainer.devices 4 --ckpt_path last

Weights and optimizer state are joined parameter by parameter (DeepSpeed's universal checkpoint); the replay buffers
stay as they are and are dealt over the new ranks when it is loaded: no entry is lost, none doubled. Nothing is trained
and no process group is needed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser

from spear_lightning.checkpoint.manifest import RANKS, STATE, describe_files, file_names, load_complete, publish

_TAG = "checkpoint"


def reshard_checkpoint(checkpoint: str, directory: str | None = None, workers: int | None = None) -> Path:
    """Write a checkpoint that any number of ranks can go on from.

    Args:
        checkpoint: directory ``iteration-…`` that ``ShardedCheckpoint`` has written under ZeRO 1 to 3.
        directory: of checkpoints to write into; by default that of ``checkpoint``, where it becomes the newest and
            ``--ckpt_path last`` finds it.
        workers: processes that read shards and write parameters; by default one a core, at most 4. Each holds about
            one shard in memory.

    Returns:
        The new checkpoint.

    Raises:
        ValueError: the checkpoint is not whole, or need not or cannot be converted; the message names the fix.
        OSError: the directory cannot be written.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported; nothing is computed here
    from deepspeed.checkpoint import ds_to_universal

    source = Path(checkpoint).expanduser()
    manifest = load_complete(source, hashes=True)
    if manifest.ranks is None:
        raise ValueError(f"{source} can be loaded by any number of ranks as it is")
    target = source.parent if directory is None else Path(directory).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".partial-reshard-{source.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    count = workers or min(4, os.cpu_count() or 1)
    try:
        arguments = Namespace(
            input_folder=str(source / STATE / _TAG),
            output_folder=str(partial / STATE / _TAG),
            num_extract_workers=count,
            num_merge_workers=count,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars go to stderr
            ds_to_universal.main(arguments)
        shutil.copytree(source / RANKS, partial / RANKS)
        names = file_names(partial)
        replace(manifest, written=time.time(), universal=True, files=describe_files(partial, names)).save(partial)
        return publish(partial, target, manifest.iteration)
    except KeyError as error:
        if "exp_avg" in str(error):
            raise ValueError(
                f"{source} was trained with an optimizer without Adam's moments, which DeepSpeed cannot convert: go on "
                f"with {manifest.world_size} ranks, or train with torch.optim.AdamW"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the conversion.

    Args:
        arguments: as on the command line; ``None`` takes the process's own.
    """
    parser = ArgumentParser(prog="spear reshard", description="Make a ZeRO checkpoint one for any number of ranks.")
    parser.add_function_arguments(reshard_checkpoint, as_positional=True)
    settings = parser.parse_args(None if arguments is None else list(arguments))
    print(f"written to {reshard_checkpoint(**settings.as_dict())}")

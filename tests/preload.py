"""Imported once, by the server that test processes are forked from."""

import contextlib
import io
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.module_inject
import deepspeed.runtime.zero.muon.muon_optimizer  # imports the compiler, in two seconds
import deepspeed.utils.zero_to_fp32  # noqa: F401
import omegaconf  # noqa: F401
import tensorboard.summary  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

from spear_lightning.cli.main import main

# Composing a configuration imports the engines and fills the parser's caches, which every run would do again.
arguments = sys.argv
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["fit", "-c", "configs/quickstart.yaml", "--trainer.strategy=ZeroStrategy", "--print_config"])
sys.argv = arguments

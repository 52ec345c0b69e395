"""Imported once, by the server that test processes are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: E402, F401
import deepspeed.utils.zero_to_fp32  # noqa: E402, F401

import spear_lightning.cli  # noqa: E402, F401

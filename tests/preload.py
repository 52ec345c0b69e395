"""Imported once, by the server that test processes are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.utils.zero_to_fp32  # noqa: F401

import spear_lightning.cli  # noqa: F401

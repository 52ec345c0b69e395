"""Sandboxes for code that a model wrote: one protocol, three back ends, none of them a bare subprocess."""

from spear_lightning.sandbox.base import Execution, Sandbox, SandboxError, SandboxLimits, Session
from spear_lightning.sandbox.bubblewrap import BubblewrapSandbox
from spear_lightning.sandbox.choice import AutoSandbox, open_sandbox
from spear_lightning.sandbox.monty import MontySandbox
from spear_lightning.sandbox.remote import RemoteSandbox

__all__ = [
    "AutoSandbox",
    "BubblewrapSandbox",
    "Execution",
    "MontySandbox",
    "RemoteSandbox",
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "Session",
    "open_sandbox",
]

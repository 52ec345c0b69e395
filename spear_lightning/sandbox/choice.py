"""Opening a sandbox by name, or the strongest one that works on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from spear_lightning.sandbox.base import INSTALL_HINT, Execution, Sandbox, SandboxError, SandboxLimits, Session
from spear_lightning.sandbox.bubblewrap import BubblewrapSandbox
from spear_lightning.sandbox.monty import MontySandbox
from spear_lightning.sandbox.remote import RemoteSandbox

logger = logging.getLogger(__name__)


class AutoSandbox(Sandbox):
    """The strongest sandbox that works here: bubblewrap, else Monty. Each is taken only after it failed to escape.

    Args:
        limits: what one call may use.

    Opening it raises :class:`SandboxError` where none works; there is no fallback to an uncontained process.
    """

    @override
    def _reset(self) -> None:
        super()._reset()
        self._chosen: Sandbox | None = None

    @property
    def chosen(self) -> Sandbox:
        """The sandbox that was taken; opens it if that was not done.

        Raises:
            SandboxError: none works here.
        """
        with self._lock:
            if self._chosen is not None:
                return self._chosen
            problems = []
            for sandbox in (BubblewrapSandbox(self.limits), MontySandbox(self.limits)):
                try:
                    sandbox.open()
                except SandboxError as error:
                    problems.append(str(error))
                    continue
                if problems:
                    logger.warning("Model code runs in %s, because: %s", type(sandbox).__name__, "; ".join(problems))
                self._chosen = sandbox
                return sandbox
            raise SandboxError(
                f"no sandbox works here, and model code is not run without one ({'; '.join(problems)}). "
                f"Install one: {INSTALL_HINT}"
            )

    @override
    def open(self) -> None:
        self.chosen.open()

    @override
    def run(self, code: str) -> Execution:
        return self.chosen.run(code)

    @override
    def session(self) -> Session:
        return self.chosen.session()

    @override
    def close(self) -> None:
        """End the sandbox that was chosen; the next call opens the same again."""
        with self._lock:
            if self._chosen is not None:
                self._chosen.close()


_SANDBOXES: dict[str, Callable[..., Sandbox]] = {
    "auto": AutoSandbox,
    "bubblewrap": BubblewrapSandbox,
    "monty": MontySandbox,
    "remote": RemoteSandbox,
}


def open_sandbox(name: str = "auto", limits: SandboxLimits | None = None, **options: Any) -> Sandbox:
    """Make a sandbox and open it.

    Args:
        name: ``auto``, ``bubblewrap``, ``monty`` or ``remote``.
        limits: what one call may use.
        **options: of the class (``url`` for ``remote``).

    Returns:
        An opened sandbox; to be closed.

    Raises:
        ValueError: there is no sandbox of this name.
        SandboxError: it cannot be used here; the message tells what to install.
    """
    if name not in _SANDBOXES:
        raise ValueError(f"there is no sandbox {name!r}: choose one of {', '.join(_SANDBOXES)}")
    sandbox = _SANDBOXES[name](limits=limits, **options)
    sandbox.open()
    return sandbox

"""The episodes of the next iteration are played in a thread while this iteration trains.

Nothing here decides anything by time: what is played, with which weights and in which order is the same however long
each side takes, and whoever asks for episodes waits for them. PyTorch's kernels and the waiting for environments
release the interpreter's lock, so the two overlap as far as there are cores, or a second stream on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from spear_lightning.rollout.collector import PlayedEpisodes

OnStep = Callable[[int, int], None]
"""Is told how many episodes are finished and how many still active."""

_POLL_SECONDS = 0.2


class _CancelledError(Exception):
    """The episodes are not wanted any more."""


class AheadPlayer:
    """Plays the episodes of one iteration at a time in the background, and keeps them until they are asked for."""

    def __init__(self) -> None:
        self._iteration: int | None = None
        self._thread: threading.Thread | None = None
        self._played: PlayedEpisodes | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._progress = (0, 0)
        self._stream: torch.cuda.Stream | None = None

    @property
    def iteration(self) -> int | None:
        """Whose episodes are being played or kept; ``None`` if there are none."""
        return self._iteration

    def start(self, iteration: int, play: Callable[[OnStep], PlayedEpisodes], device: torch.device) -> None:
        """Play in the background.

        Args:
            iteration: whose episodes they are.
            play: plays them; is given a function to call after each step.
            device: that is generated on.

        Raises:
            RuntimeError: others are being played or have not been taken.
        """
        if self._iteration is not None:
            raise RuntimeError(f"the episodes of iteration {self._iteration} have not been taken")
        self._iteration, self._cancelled, self._progress = iteration, False, (0, 0)
        stream = self._own_stream(device)

        def run() -> None:
            try:
                with stream:
                    self._played = play(self._on_step)
            except _CancelledError:
                pass
            except BaseException as error:  # raised again by whoever asks for the episodes
                self._error = error

        # A daemon: a process that ends by an exception must not wait for episodes that nobody will see.
        self._thread = threading.Thread(target=run, name=f"rollout of iteration {iteration}", daemon=True)
        self._thread.start()

    def keep(self, iteration: int, played: PlayedEpisodes) -> None:
        """Keep episodes that were played before (from a checkpoint)."""
        self.cancel()
        self._iteration, self._played = iteration, played

    def wait(self, on_step: OnStep | None = None) -> None:
        """Until nothing is being played any more.

        Args:
            on_step: is told now and then, in the thread that waits, how far it is.

        Raises:
            BaseException: what playing has raised.
        """
        told = (0, 0)
        while self._thread is not None:
            self._thread.join(None if on_step is None else _POLL_SECONDS)
            if on_step is not None and self._progress != told:
                told = self._progress
                on_step(*told)
            if not self._thread.is_alive():
                self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            self._iteration = None
            raise error

    def peek(self) -> tuple[int, PlayedEpisodes] | None:
        """The iteration and its episodes, once they are played, without taking them; ``None`` if there are none."""
        self.wait()
        if self._iteration is None or self._played is None:
            return None
        return self._iteration, self._played

    def take(self, on_step: OnStep | None = None) -> PlayedEpisodes:
        """The episodes, once they are played; they are not kept any longer.

        Args:
            on_step: see :meth:`wait`.

        Raises:
            RuntimeError: there are none.
            BaseException: what playing has raised.
        """
        self.wait(on_step)
        played = self._played
        if played is None:
            raise RuntimeError("no episodes have been played ahead")
        self._iteration = self._played = None
        return played

    def cancel(self) -> None:
        """Forget what is being played or kept; a thread ends after the step it is at."""
        self._cancelled = True
        if self._thread is not None:
            self._thread.join()
        self._thread = self._played = self._error = self._iteration = None

    def _on_step(self, finished: int, active: int) -> None:
        if self._cancelled:
            raise _CancelledError
        self._progress = (finished, active)

    def _own_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """Kernels of the thread go beside those of the update, after all that was issued until now."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:  # one for all rollouts: memory that a stream has freed is kept for that stream
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

"""Rollouts with the policy that is trained: on-policy, or one iteration ahead of training in a background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn

from spear_lightning.engines.base import Sampling
from spear_lightning.environments.base import Split
from spear_lightning.policy.policy import Policy
from spear_lightning.policy.snapshot import WeightSnapshot
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Episode, Rollout
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.utils.randomness import stream_seed

OnStep = Callable[[int, int], None]
"""Called with the number of episodes finished and still active."""

_POLL_SECONDS = 0.2


class _CancelledError(Exception):
    """The rollout was cancelled."""


class AsyncRollout:
    """Plays the episodes of one iteration in a background thread and keeps them until they are taken."""

    def __init__(self) -> None:
        self._future: Future[Rollout] | None = None
        self._iteration: int | None = None
        self._cancelled = False
        self._progress = (0, 0)
        self._stream: torch.cuda.Stream | None = None

    @property
    def iteration(self) -> int | None:
        """Number of the iteration being played or kept; ``None`` if there is none."""
        return self._iteration

    def start(self, iteration: int, play: Callable[[OnStep], Rollout], device: torch.device) -> None:
        """Play in the background.

        Args:
            iteration: its number.
            play: plays its episodes; is given a function to call after each step.
            device: of the engine.

        Raises:
            RuntimeError: another iteration is being played or has not been taken.
        """
        if self._iteration is not None:
            raise RuntimeError(f"the episodes of iteration {self._iteration} have not been taken")
        self._iteration, self._cancelled, self._progress = iteration, False, (0, 0)
        self._future = future = Future[Rollout]()
        stream = self._own_stream(device)

        def run() -> None:
            try:
                with stream:
                    future.set_result(play(self._on_step))
            except BaseException as error:  # raised again by wait()
                future.set_exception(error)

        # A daemon thread (executors have none): a process that ends by an exception must not wait for it.
        threading.Thread(target=run, name=f"rollout of iteration {iteration}", daemon=True).start()

    def keep(self, played: Rollout) -> None:
        """Keep a rollout from a checkpoint."""
        self.cancel()
        self._iteration, self._future = played.iteration, Future[Rollout]()
        self._future.set_result(played)

    def wait(self, on_step: OnStep | None = None) -> Rollout | None:
        """The rollout, once it is complete, without taking it; ``None`` if there is none.

        Args:
            on_step: progress, called in the waiting thread.

        Raises:
            BaseException: what playing has raised.
        """
        future = self._future
        if future is None:
            return None
        reported = (0, 0)
        while futures.wait([future], None if on_step is None else _POLL_SECONDS).not_done:
            if on_step is not None and self._progress != reported:
                reported = self._progress
                on_step(*reported)
        if future.exception() is not None:
            self._future = self._iteration = None
        elif on_step is not None and self._progress != reported:
            on_step(*self._progress)
        return future.result()

    def take(self, on_step: OnStep | None = None) -> Rollout:
        """The rollout, once it is complete; it is not kept any longer.

        Args:
            on_step: progress, called in the waiting thread.

        Raises:
            RuntimeError: there is none.
            BaseException: what playing has raised.
        """
        played = self.wait(on_step)
        if played is None:
            raise RuntimeError("no episodes have been played ahead")
        self._iteration = self._future = None
        return played

    def cancel(self) -> None:
        """Forget what is being played or kept; the thread ends after its current step."""
        self._cancelled = True
        if self._future is not None:
            futures.wait([self._future])
        self._future = self._iteration = None

    def _on_step(self, finished: int, active: int) -> None:
        if self._cancelled:
            raise _CancelledError
        self._progress = (finished, active)

    def _own_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """A CUDA stream of its own, so that kernels run beside the update, after all that was issued until now."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:  # one for all rollouts: memory that a stream has freed is kept for that stream
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)


class PolicyOwner(Protocol):
    """The module that trains, as far as rollouts need it.

    Attributes:
        policy: being trained.
        weight_version: optimizer steps taken.
        training: whether it is in training mode.
    """

    policy: Policy
    weight_version: int
    training: bool

    @property
    def device(self) -> torch.device:
        """Device of the policy."""

    def rollout_policy(self) -> Policy:
        """The policy to play with, with all its weights."""

    def release_rollout_policy(self) -> None:
        """Free the copy of the weights, if :meth:`rollout_policy` made one."""

    def train(self, mode: bool = True) -> object:
        """Set training or evaluation mode."""


class RolloutRunner:
    """Syncs weights to the engine and plays one rollout at a time: there is one engine and one set of environments.

    Ahead of training, the weights that play an iteration are a function of its number alone: those after the iteration
    before the last (the first two iterations are played with the initial weights).

    Args:
        owner: of the policy.
        collector: plays the episodes.
        sampling: parameters by split.
        seed: of the run.
        max_turns: of an episode.
        on_start: called with split and number of episodes when a rollout starts; returns the progress callback.
        iterations: of the run; ``None`` or -1 if unlimited.
        ahead: play the next iteration while one trains.

    Attributes:
        ahead: the rollout in the background.
    """

    def __init__(
        self,
        owner: PolicyOwner,
        collector: Collector,
        sampling: Callable[[Split], Sampling],
        seed: int,
        max_turns: int,
        on_start: Callable[[Split, int], OnStep],
        iterations: int | None = None,
        ahead: bool = False,
    ) -> None:
        self._owner, self._collector, self._sampling = owner, collector, sampling
        self._seed, self._max_turns = seed, max_turns
        self._on_start, self._iterations = on_start, iterations
        self.ahead = AsyncRollout()
        self._snapshot = WeightSnapshot(owner.policy) if ahead else None

    def play(self, split: Split, specs: Sequence[EpisodeSpec], iteration: int) -> Rollout:
        """Play with the current weights, after any background rollout has ended.

        Args:
            split: of the tasks.
            specs: episodes of this rank.
            iteration: recorded in the episodes; part of their seeds.
        """
        self.ahead.wait()
        owner = self._owner
        on_step = self._on_start(split, len(specs))
        training = owner.training
        played = self._ready(split, specs, iteration, owner.rollout_policy)(on_step)
        owner.release_rollout_policy()
        owner.train(training)
        return played

    def play_iteration(self, iteration: int, specs_of: Callable[[int], Sequence[EpisodeSpec]]) -> Rollout:
        """The training rollout of an iteration; if ``ahead``, the next one is started in the background.

        Args:
            iteration: from 0.
            specs_of: episodes of this rank by iteration.
        """
        specs = specs_of(iteration)
        if self._snapshot is None:
            return self.play("train", specs, iteration)
        if self.ahead.iteration != iteration:  # the first iteration of all, or a checkpoint of an on-policy run
            self._begin(iteration, specs)
        on_step = self._on_start("train", len(specs))
        played = self.ahead.take(on_step)
        if {_name(episode) for episode in (*played.episodes, *played.aborted)} != set(map(_name, specs)):
            rank_zero_warn(
                f"the checkpoint has episodes of iteration {iteration} of other tasks than data.environment and "
                "data.rollouts say now: they are played anew"
            )
            self._begin(iteration, specs)
            played = self.ahead.take(on_step)
        if self._iterations in (None, -1) or iteration + 1 < self._iterations:
            self._begin(iteration + 1, specs_of(iteration + 1))
        return played

    def close(self) -> None:
        """Stop the background rollout and the environment workers, and free the engine."""
        self.ahead.cancel()
        self._collector.close()

    def _begin(self, iteration: int, specs: Sequence[EpisodeSpec]) -> None:
        """Play an iteration in the background, with a copy of the current weights."""
        assert self._snapshot is not None
        play = self._ready("train", specs, iteration, self._snapshot.take)
        self.ahead.start(iteration, play, self._owner.device)

    def _ready(
        self, split: Split, specs: Sequence[EpisodeSpec], iteration: int, policy: Callable[[], Policy]
    ) -> Callable[[OnStep], Rollout]:
        """Sync the weights to the engine now; the returned function plays with them."""
        collector, engine = self._collector, self._collector.engine
        started = time.perf_counter()
        engine.wake()
        engine.sync(policy(), self._owner.weight_version)
        synced = time.perf_counter() - started

        def play(on_step: OnStep) -> Rollout:
            played = collector.play(
                specs,
                self._sampling(split),
                iteration=iteration,
                seed=stream_seed(split, self._seed),
                max_turns=self._max_turns,
                split=split,
                on_step=on_step,
            )
            engine.sleep()
            played.seconds["sync"] = synced
            return played

        return play


def _name(episode: Episode | EpisodeSpec) -> tuple[str, int, int]:
    return episode.task.id, episode.group, episode.index

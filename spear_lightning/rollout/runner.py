"""Rollouts with the policy that is trained: with the weights that it will train, or ahead of it with those before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.engines.base import Sampling
from spear_lightning.environments.base import Split
from spear_lightning.policy.policy import Policy
from spear_lightning.policy.snapshot import WeightSnapshot
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.episode import Episode, Rollout
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.utils.randomness import stream_seed

OnStep = Callable[[int, int], None]
"""Is told how many episodes are finished and how many still active."""

_POLL_SECONDS = 0.2


class _CancelledError(Exception):
    """The episodes are not wanted any more."""


class AsyncRollout:
    """Plays the episodes of one iteration at a time in the background, and keeps them until they are asked for."""

    def __init__(self) -> None:
        self._iteration: int | None = None
        self._thread: threading.Thread | None = None
        self._played: Rollout | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._progress = (0, 0)
        self._stream: torch.cuda.Stream | None = None

    @property
    def iteration(self) -> int | None:
        """Whose episodes are being played or kept; ``None`` if there are none."""
        return self._iteration

    def start(self, iteration: int, play: Callable[[OnStep], Rollout], device: torch.device) -> None:
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

    def keep(self, played: Rollout) -> None:
        """Keep episodes that were played before (from a checkpoint)."""
        self.cancel()
        self._iteration, self._played = played.iteration, played

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

    def peek(self) -> Rollout | None:
        """The episodes, once they are played, without taking them; ``None`` if there are none."""
        self.wait()
        return self._played

    def take(self, on_step: OnStep | None = None) -> Rollout:
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


SpecsOf = Callable[[int], Sequence[EpisodeSpec]]
"""The episodes that this rank plays in an iteration."""

Tell = Callable[[Split, int], OnStep]
"""Tells whom it concerns that a rollout of so many episodes starts; returns what tells them of its steps."""


class PolicyOwner(Protocol):
    """Trains a policy and lends it for rollouts.

    Attributes:
        policy: that is trained.
        weight_version: optimizer steps taken.
        training: whether it is in training mode.
    """

    policy: Policy
    weight_version: int
    training: bool

    @property
    def device(self) -> torch.device:
        """That the policy is on."""

    def rollout_policy(self) -> Policy:
        """The policy to play with, with all its weights."""

    def release_rollout_policy(self) -> None:
        """Nothing is generated any more in this phase."""

    def train(self, mode: bool = True) -> object:
        """Set training or evaluation mode."""


def check_whole_weights(strategy: Strategy) -> None:
    """Refuse to play ahead where no rank has all weights.

    Raises:
        MisconfigurationException: the strategy partitions them; names the keys and the fix.
    """
    if isinstance(strategy, ZeroStrategy) and strategy.stage == 3:
        raise MisconfigurationException(
            "data.rollouts.max_staleness is 1, which plays with a copy of all weights while they are trained, and "
            "stage 3 of ZeroStrategy is for weights that do not fit on one rank: set data.rollouts.max_staleness to 0, "
            "or the strategy's stage to 0, 1 or 2"
        )


class RolloutRunner:
    """Plays what it is asked for, one rollout at a time: there is one engine and one set of environments.

    Ahead of training, the weights that play an iteration are a function of its number alone: those after the iteration
    before the last (the first two iterations are played with those of the start). Whoever is faster waits.

    Args:
        owner: whose policy plays.
        collector: that plays.
        sampling: how tokens are drawn in a split.
        seed: of the run.
        max_turns: of an episode.
        tell: of rollouts and their steps.
        iterations: of the run; ``None`` or -1 where it has no end.
        ahead: play the next iteration while one trains.
    """

    def __init__(
        self,
        owner: PolicyOwner,
        collector: Collector,
        sampling: Callable[[Split], Sampling],
        seed: int,
        max_turns: int,
        tell: Tell,
        iterations: int | None = None,
        ahead: bool = False,
    ) -> None:
        self._owner, self._collector, self._sampling = owner, collector, sampling
        self._seed, self._max_turns = seed, max_turns
        self._tell, self._iterations = tell, iterations
        self._ahead = AsyncRollout()
        self._snapshot = WeightSnapshot(owner.policy) if ahead else None

    def play(self, split: Split, specs: Sequence[EpisodeSpec], iteration: int) -> Rollout:
        """Play with the weights as they are now, once nothing else is played any more.

        Args:
            split: that the tasks are of.
            specs: the episodes of this rank.
            iteration: recorded in them, and part of the name of their random numbers.
        """
        self._ahead.wait()
        owner = self._owner
        on_step = self._tell(split, len(specs))
        training = owner.training
        played = self._ready(split, specs, iteration, owner.rollout_policy)(on_step)
        owner.release_rollout_policy()
        owner.train(training)
        return played

    def play_iteration(self, iteration: int, specs_of: SpecsOf) -> Rollout:
        """The training episodes of an iteration; ahead of training, those of the next one are begun.

        Args:
            iteration: from 0.
            specs_of: the episodes of this rank in any iteration.
        """
        specs = specs_of(iteration)
        if self._snapshot is None:
            return self.play("train", specs, iteration)
        if self._ahead.iteration != iteration:  # the first iteration of all, or a checkpoint of an on-policy run
            self._begin(iteration, specs)
        on_step = self._tell("train", len(specs))
        played = self._ahead.take(on_step)
        if {_name(episode) for episode in (*played.episodes, *played.aborted)} != set(map(_name, specs)):
            rank_zero_warn(
                f"the checkpoint has episodes of iteration {iteration} of other tasks than data.environment and "
                "data.rollouts say now: they are played anew"
            )
            self._begin(iteration, specs)
            played = self._ahead.take(on_step)
        if self._iterations in (None, -1) or iteration + 1 < self._iterations:
            self._begin(iteration + 1, specs_of(iteration + 1))
        return played

    def keep(self, played: Rollout) -> None:
        """Keep the episodes of an iteration that a checkpoint has, until it comes."""
        self._ahead.keep(played)

    def kept(self) -> Rollout | None:
        """The episodes of the next iteration, once they are all played; ``None`` where none are played ahead."""
        return self._ahead.peek()

    def cancel(self) -> None:
        """Play no further, and forget what has been played ahead."""
        self._ahead.cancel()

    def close(self) -> None:
        """Stop playing, stop the workers and free the engine."""
        self.cancel()
        self._collector.close()

    def _begin(self, iteration: int, specs: Sequence[EpisodeSpec]) -> None:
        """Play an iteration in the background, with a copy of the weights as they are now."""
        assert self._snapshot is not None
        play = self._ready("train", specs, iteration, self._snapshot.take)
        self._ahead.start(iteration, play, self._owner.device)

    def _ready(
        self, split: Split, specs: Sequence[EpisodeSpec], iteration: int, policy: Callable[[], Policy]
    ) -> Callable[[OnStep], Rollout]:
        """Hand the weights to the engine now; what plays with them when it is called."""
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

"""Settings of the two kinds of rollout phase, checked when they are read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRollouts:
    """How an iteration's episodes are played.

    Args:
        tasks: B, tasks per iteration over all ranks.
        group_size: G, episodes per task.
        temperature: of the softmax that tokens are drawn from.
        top_p: must be 1. Any truncation draws from another distribution than the one whose log-probabilities are
            stored, and the importance ratio would be wrong.
        top_k: must be 0, for the same reason.
        max_staleness: 0 plays an iteration with the weights that it will train. 1 plays the next iteration while this
            one trains, so with weights that are one iteration old from the second iteration on; importance ratios are
            taken against the log-probabilities it was played with. More would only be older: one engine plays one
            iteration at a time.
        resample: most further rounds of an iteration (DAPO's dynamic sampling), in which groups whose episodes all got
            the same reward are replaced by groups of fresh tasks. An iteration may then take
            ``tasks * (1 + resample)`` tasks; it learns from B groups at most.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    tasks: int = 8
    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_staleness: int = 0
    resample: int = 0

    def __post_init__(self) -> None:
        if self.max_staleness not in (0, 1):
            raise ValueError(
                f"data.rollouts.max_staleness must be 0 (strictly on-policy) or 1 (the next iteration is played while "
                f"this one trains), not {self.max_staleness}"
            )
        for name in ("tasks", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.rollouts.{name} must be at least 1, not {getattr(self, name)}")
        if self.resample < 0:
            raise ValueError(f"data.rollouts.resample must not be negative: {self.resample}")
        if self.resample and self.max_staleness:
            raise ValueError(
                f"data.rollouts.resample is {self.resample} and data.rollouts.max_staleness 1, but who plays ahead "
                "cannot know yet which groups will be missing: set max_staleness to 0, or resample to 0"
            )
        if self.resample and self.group_size == 1:
            raise ValueError(
                f"data.rollouts.resample is {self.resample} and data.rollouts.group_size 1, but the reward of a single "
                "episode never differs from itself, so every group would be replaced: raise group_size, or set "
                "resample to 0"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"data.rollouts.temperature must be above 0, not {self.temperature}: "
                "greedy episodes have no importance ratio; use data.evaluation.temperature for greedy evaluation"
            )
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"data.rollouts.top_p={self.top_p}, top_k={self.top_k}: truncated sampling in training would make the "
                "importance ratio wrong; leave top_p at 1 and top_k at 0 (both are allowed in data.evaluation)"
            )


@dataclass(frozen=True)
class Evaluation:
    """How held-out tasks are played by ``validate``, ``test`` and ``predict``.

    Args:
        temperature: of the softmax; 0 is greedy.
        top_p: nucleus; 1 keeps everything.
        top_k: number of tokens kept; 0 keeps everything.
        episodes_per_task: attempts at each task.
        tasks: how many tasks of the split are played, the first ones in its order; ``None`` takes all.
        batch: episodes played together.

    Raises:
        ValueError: a value is out of range; the message names the key.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    episodes_per_task: int = 1
    tasks: int | None = None
    batch: int = 128

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"data.evaluation.temperature must not be negative: {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"data.evaluation.top_p must be in (0, 1], not {self.top_p}")
        for name, least in (("top_k", 0), ("episodes_per_task", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.evaluation.{name} must be at least {least}, not {getattr(self, name)}")
        if self.tasks is not None and self.tasks < 1:
            raise ValueError(f"data.evaluation.tasks must be at least 1 or null, not {self.tasks}")

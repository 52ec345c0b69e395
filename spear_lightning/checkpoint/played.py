"""Episodes that have been played and not yet learned from, in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from spear_lightning.data.token_pool import TokenPool
from spear_lightning.environments.base import Task
from spear_lightning.rollout.collector import PlayedEpisodes
from spear_lightning.rollout.episode import Episode, Turn

_FORMAT = 1
_GENERATED = ("response_ids", "logps", "entropies")
_TURN = [field.name for field in fields(Turn) if field.name not in ("prompt_ids", *_GENERATED)]
_EPISODE = [field.name for field in fields(Episode) if field.name not in ("task", "turns")]


def played_to_state(iteration: int, played: PlayedEpisodes) -> dict[str, Any]:
    """Episodes as plain types and a few tensors.

    Args:
        iteration: that they were played for.
        played: on this rank.
    """
    pool = TokenPool()
    turns = [turn for episode in played.episodes for turn in episode.turns]
    slices = [pool.add(turn.prompt_ids) for turn in turns]
    pool.complete()
    joined = {name: _joined([getattr(turn, name) for turn in turns]) for name in _GENERATED}
    return {
        "format": _FORMAT,
        "iteration": iteration,
        "seconds": dict(played.seconds),
        "shortened": dict(played.shortened),
        "pool": torch.from_numpy(pool.tokens),
        "slices": _joined(slices),
        "slice_counts": [len(part) for part in slices],
        "token_counts": [len(turn.response_ids) for turn in turns],
        **joined,
        "episodes": [
            {name: _plain(getattr(episode, name)) for name in _EPISODE}
            | {"task": {field.name: getattr(episode.task, field.name) for field in fields(Task)}}
            | {"turns": [{name: _plain(getattr(turn, name)) for name in _TURN} for turn in episode.turns]}
            for episode in played.episodes
        ],
    }


def played_from_states(states: Iterable[dict[str, Any]], rank: int, world_size: int) -> tuple[int, PlayedEpisodes]:
    """The episodes that a rank would have played, of those that all ranks of the saved run have played.

    Args:
        states: of all ranks, from :func:`played_to_state`.
        rank: of this process.
        world_size: number of processes now; groups are dealt over them as tasks are
            (:func:`spear_lightning.rollout.specs.training_specs`).

    Returns:
        The iteration they were played for, and the episodes in order of group and index.

    Raises:
        ValueError: a state was written by another version of this program.
    """
    episodes: list[Episode] = []
    seconds: dict[str, float] = {}
    shortened: dict[str, int] = {}
    iteration = 0
    for state in states:
        if state["format"] != _FORMAT:
            raise ValueError(
                f"the episodes in the checkpoint have format {state['format']}, and this version of spear-lightning "
                f"reads {_FORMAT}: go on with the version that wrote it"
            )
        iteration = state["iteration"]
        episodes += (episode for episode in _episodes(state) if episode.group % world_size == rank)
        seconds = {name: max(value, seconds.get(name, 0.0)) for name, value in state["seconds"].items()}
        for name, count in state["shortened"].items():
            shortened[name] = shortened.get(name, 0) + count
    episodes.sort(key=lambda episode: (episode.group, episode.index))
    return iteration, PlayedEpisodes(episodes, seconds, shortened)


def _episodes(state: dict[str, Any]) -> Iterator[Episode]:
    pool = TokenPool(state["pool"].numpy())
    prompts = iter(torch.split(state["slices"], state["slice_counts"]))
    generated = {name: iter(torch.split(state[name], state["token_counts"])) for name in _GENERATED}
    for values in state["episodes"]:
        turns = [
            Turn(
                prompt_ids=pool.take(next(prompts).numpy()),
                **{**turn, **{name: next(generated[name]).numpy() for name in _GENERATED}},
            )
            for turn in values["turns"]
        ]
        yield Episode(**{**values, "task": Task(**values["task"]), "turns": turns})


def _joined(arrays: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)) if arrays else torch.zeros(0)


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy's, which a checkpoint does not hold."""
    return value.item() if isinstance(value, np.generic) else value

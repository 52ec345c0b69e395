"""What each rank holds, in a checkpoint: its replay buffer, dealt over other ranks, and episodes played ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_lightning.algorithm import ReplayBuffer
from spear_lightning.data.token_pool import StoredSample, TokenPool, store_samples
from spear_lightning.environments.base import Task
from spear_lightning.rollout.episode import Episode, Rollout, Turn
from spear_lightning.utils.randomness import stream_seed

_REPLAY_FORMATS = (3, 2)
"""Of the state of a buffer: as it is written, and what else is read (2 had no weights)."""

_PLAYED_FORMATS = (2,)
_GENERATED = ("response_ids", "logps", "entropies")
_TURN = [field.name for field in fields(Turn) if field.name not in ("prompt_ids", *_GENERATED)]
_EPISODE = (  # what is known before it is scored
    ("group", "index", "iteration", "context", "score", "success", "answer", "status", "reason", "weight_version")
)


def replay_to_state(replay: ReplayBuffer) -> dict[str, Any]:
    """A buffer as plain types and tensors, which a checkpoint can hold without pickling our classes."""
    state = replay.state_dict()
    pools = {id(sample.pool): sample.pool for sample in (entry["payload"] for entry in state["entries"])}
    numbers = {key: number for number, key in enumerate(pools)}
    return {
        **state,
        "format": _REPLAY_FORMATS[0],
        "pools": [torch.from_numpy(pool.tokens.copy()) for pool in pools.values()],
        "entries": [
            {**entry, "pool": numbers[id(entry["payload"].pool)], "payload": _to_tensors(entry["payload"])}
            for entry in state["entries"]
        ],
    }


def load_replay(replay: ReplayBuffer, states: Sequence[dict[str, Any]] | RankFiles, rank: int, world_size: int) -> None:
    """Fill this rank's buffer from the saved buffers of all ranks.

    With as many ranks as then, each takes its own back. Otherwise entries are dealt by a hash of their key: none is
    lost, none is doubled.

    Args:
        replay: this rank's buffer.
        states: one per rank of the run that saved them, from :func:`replay_to_state`. Each is asked for once.
        rank: of this process.
        world_size: number of processes now.

    Raises:
        ValueError: a state was written by another version of this program.
    """
    if len(states) == world_size:
        entries = _entries(states[rank])
    else:
        entries = []
        for number in range(len(states)):
            saved = _entries(states[number])
            mine = [entry for entry in saved if stream_seed("re-deal", entry["key"]) % world_size == rank]
            # In a pool of their own: that of the rank that had them also has what is not theirs.
            samples = store_samples(entry["payload"].with_advantage(0.0) for entry in mine)
            entries += [{**entry, "payload": sample} for entry, sample in zip(mine, samples, strict=True)]
    replay.load_state_dict({"entries": entries})


def _entries(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a saved buffer."""
    _check_format(state, "the replay buffer", _REPLAY_FORMATS)
    pools = [TokenPool(tokens.numpy()) for tokens in state["pools"]]
    return [
        {
            **{name: value for name, value in entry.items() if name != "pool"},
            "payload": StoredSample(
                pools[entry["pool"]], **{name: tensor.numpy() for name, tensor in entry["payload"].items()}
            ),
        }
        for entry in state["entries"]
    ]


def _check_format(state: dict[str, Any], what: str, read: tuple[int, ...]) -> None:
    if state.get("format") not in read:
        raise ValueError(
            f"{what} in the checkpoint has format {state.get('format', 1)}, and this version of spear-lightning reads "
            f"{' and '.join(map(str, read))}: go on with the version that wrote it, or start from its weights (spear "
            "export)"
        )


class RankFiles:
    """One thing that all ranks held, in a folder with a file a rank, of which no more than one is in memory at a time.

    Args:
        folder: of a checkpoint's rank files.
        name: of the thing: ``replay`` or ``played``.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def __len__(self) -> int:
        return len(list(self._folder.glob("rank-*.pt")))

    def __getitem__(self, rank: int) -> dict[str, Any]:
        """What a rank held.

        Raises:
            ValueError: its file is missing or damaged.
        """
        path = _rank_file(self._folder, rank)
        try:
            states: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
            if "entries" in states:
                raise ValueError("it was written by another version of spear-lightning")
            return states[self._name]
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise ValueError(f"what rank {rank} held ({self._name}) cannot be read from {path}: {error}") from error


def save_rank_file(folder: Path, rank: int, states: dict[str, Any]) -> None:
    """Write what a rank holds, by name, where :class:`RankFiles` finds it."""
    torch.save(states, _rank_file(folder, rank))


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _to_tensors(sample: StoredSample) -> dict[str, torch.Tensor]:
    arrays = {name: getattr(sample, name) for name in ("slices", "logps", "spans", "weights")}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array is not None}


def played_to_state(played: Rollout) -> dict[str, Any]:
    """Training episodes of this rank that were played and not yet scored, as plain types and a few tensors."""
    pool = TokenPool()
    episodes = [*played.episodes, *played.aborted]
    turns = [turn for episode in episodes for turn in episode.turns]
    slices = [pool.add(turn.prompt_ids) for turn in turns]
    pool.complete()
    joined = {name: _joined([getattr(turn, name) for turn in turns]) for name in _GENERATED}
    return {
        "format": _PLAYED_FORMATS[0],
        "iteration": played.iteration,
        "seconds": dict(played.seconds),
        "pool": torch.from_numpy(pool.tokens),
        "slices": _joined(slices),
        "slice_counts": [len(part) for part in slices],
        "token_counts": [len(turn.response_ids) for turn in turns],
        **joined,
        "episodes": [
            {name: _plain(getattr(episode, name)) for name in _EPISODE}
            | {"task": {field.name: getattr(episode.task, field.name) for field in fields(Task)}}
            | {"turns": [{name: _plain(getattr(turn, name)) for name in _TURN} for turn in episode.turns]}
            for episode in episodes
        ],
    }


def played_from_states(states: Iterable[dict[str, Any]], rank: int, world_size: int) -> Rollout:
    """The episodes that a rank would have played, of those that all ranks of the saved run have played.

    Args:
        states: of all ranks, from :func:`played_to_state`.
        rank: of this process.
        world_size: number of processes now; groups are dealt over them as tasks are
            (:func:`spear_lightning.rollout.specs.training_specs`).

    Returns:
        The episodes in order of group and index.

    Raises:
        ValueError: a state was written by another version of this program.
    """
    episodes: list[Episode] = []
    seconds: dict[str, float] = {}
    iteration = 0
    for state in states:
        _check_format(state, "the record of played episodes", _PLAYED_FORMATS)
        iteration = state["iteration"]
        episodes += (episode for episode in _episodes(state) if episode.group % world_size == rank)
        seconds = {name: max(value, seconds.get(name, 0.0)) for name, value in state["seconds"].items()}
    episodes.sort(key=lambda episode: (episode.group, episode.index))
    return Rollout.of("train", iteration, episodes, seconds)


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

"""What a rollout is summarised by; the names are documented in docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from spear_lightning.data.scoring import Rollout, ScoredEpisode
from spear_lightning.environments.mixture import belongs, with_families
from spear_lightning.metrics.store import MetricStore


def record_rollout(store: MetricStore, rollout: Rollout) -> None:
    """Add the summary of ``rollout`` to ``store``.

    Training names are prefixed ``rollout/``, those of the other splits with the split's name.
    """
    prefix = "rollout" if rollout.split == "train" else rollout.split
    scored, count = rollout.episodes, len(rollout.episodes)
    _means(store, f"{prefix}/success", (item.episode.success for item in scored))
    _means(store, f"{prefix}/score", (item.episode.score for item in scored))
    _means(store, f"{prefix}/turns", (len(item.episode.turns) for item in scored))
    _means(store, f"{prefix}/tokens", (item.episode.generated_tokens for item in scored))
    _means(store, f"{prefix}/tool_calls", (item.episode.tool_calls for item in scored))
    _means(store, f"{prefix}/truncated", (item.episode.status == "truncated" for item in scored))
    _means(store, f"{prefix}/overlong", (item.episode.reason == "overlong" for item in scored))
    _means(store, f"{prefix}/invalid", (not turn.valid for item in scored for turn in item.episode.turns))
    _means(store, f"{prefix}/response_length", (len(t.response_ids) for item in scored for t in item.episode.turns))
    for kind in with_families([item.episode.task.task_type for item in scored]):
        _means(
            store,
            f"{prefix}/success/{kind}",
            (i.episode.success for i in scored if belongs(i.episode.task.task_type, kind)),
        )
    entropies = [turn.entropies for item in scored for turn in item.episode.turns if len(turn.entropies)]
    if entropies:
        _means(store, f"{prefix}/entropy", np.concatenate(entropies))
    store.sum(f"{prefix}/episodes", count)
    store.sum(f"{prefix}/aborted", len(rollout.aborted))
    for phase, seconds in rollout.seconds.items():
        store.max(f"time/{prefix}_{phase}", seconds)
    elapsed = sum(rollout.seconds.values())
    if elapsed > 0:  # a sum over ranks: every rank generates at its own rate
        store.sum(f"{prefix}/tokens_per_second", sum(item.episode.generated_tokens for item in scored) / elapsed)
    if rollout.split == "train":
        _record_training(store, scored)


def _record_training(store: MetricStore, scored: list[ScoredEpisode]) -> None:
    _means(store, "reward/total", (item.reward for item in scored))
    for part in scored[0].parts if scored else ():
        _means(store, f"reward/{part}", (item.parts[part] for item in scored))
    _means(store, "reward/penalty", (-item.penalties.sum() for item in scored))
    _means(store, "reward/group_std", (item.group_std for item in scored))
    _means(store, "reward/flat_groups", (item.group_std == 0 for item in scored))
    _means(store, "filter/group_kept", (item.group_kept for item in scored))
    filters = Counter(name for item in scored for name in item.filters)
    for name in ("overlong", "incomplete", "repetitive", "unreadable"):
        store.sum(f"filter/{name}", filters[name])
    kept = [value for item in scored for value, keep in zip(item.advantages, item.keep, strict=True) if keep]
    _means(store, "advantage/fresh", kept)
    _means(store, "advantage/fresh_magnitude", np.abs(kept))


def _means(store: MetricStore, name: str, values: Iterable[float]) -> None:
    array = np.asarray(list(values), dtype=np.float64)
    array = array[~np.isnan(array)]
    if array.size:
        store.mean(name, float(array.mean()), float(array.size))

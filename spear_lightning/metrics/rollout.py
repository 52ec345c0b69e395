"""What a rollout is summarised by; the names are documented in docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from spear_lightning.environments.mixture import belongs, with_families
from spear_lightning.metrics.evaluation import Results
from spear_lightning.metrics.store import MetricStore
from spear_lightning.rollout.episode import Episode, Rollout


def record_rollout(store: MetricStore, rollout: Rollout) -> None:
    """Add the summary of ``rollout`` to ``store``.

    Training names are prefixed ``rollout/``, those of the other splits with the split's name.
    """
    prefix = "rollout" if rollout.split == "train" else rollout.split
    scored = rollout.episodes
    records = Results().add(rollout).records
    for name in ("success", "score", "turns", "tokens", "tool_calls"):
        _means(store, f"{prefix}/{name}", (getattr(record, name) for record in records))
    _means(store, f"{prefix}/truncated", (item.status == "truncated" for item in scored))
    _means(store, f"{prefix}/overlong", (item.reason == "overlong" for item in scored))
    _means(store, f"{prefix}/invalid", (not turn.valid for item in scored for turn in item.turns))
    _means(store, f"{prefix}/shortened", (turn.shortened != "" for item in scored for turn in item.turns))
    _means(store, f"{prefix}/response_length", (len(t.response_ids) for item in scored for t in item.turns))
    for name in with_families([record.task_type for record in records]):
        _means(store, f"{prefix}/success/{name}", (each.success for each in records if belongs(each.task_type, name)))
    entropies = [turn.entropies for item in scored for turn in item.turns if len(turn.entropies)]
    if entropies:
        _means(store, f"{prefix}/entropy", np.concatenate(entropies))
    store.sum(f"{prefix}/episodes", len(records))
    store.sum(f"{prefix}/aborted", len(rollout.aborted))
    for phase, seconds in rollout.seconds.items():
        store.max(f"time/{prefix}_{phase}", seconds)
    elapsed = sum(rollout.seconds.values())
    if elapsed > 0:  # a sum over ranks: every rank generates at its own rate
        store.sum(f"{prefix}/tokens_per_second", sum(record.tokens for record in records) / elapsed)
    if rollout.split == "train":
        _record_training(store, scored)


def _record_training(store: MetricStore, scored: list[Episode]) -> None:
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

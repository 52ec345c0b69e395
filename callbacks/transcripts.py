"""Episodes as text: JSON records for programs, transcripts for people. What the policy wrote is hostile input."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spear_lightning.rollout.episode import Episode, Rollout, Turn
from spear_lightning.utils.randomness import stream_seed

# Characters of one observation or response that a transcript shows; the JSON record has all of them.
SHOWN = 2000

_EPISODE = ("group", "index", "context", "weight_version", "status", "reason", "success")
_SCORED = ("reward", "parts", "group_kept", "group_mean", "group_std")


def record(split: str, iteration: int, rank: int, episode: Episode) -> dict[str, Any]:
    """An episode as a dictionary that strict JSON can hold.

    Args:
        split: which tasks were played.
        iteration: number that the file is named by.
        rank: of the process that played it.
        episode: as scored, or aborted.
    """
    task = episode.task
    entry: dict[str, Any] = {"split": split, "iteration": iteration, "rank": rank}
    entry["task"] = {"id": task.id, "task_type": task.task_type, "seed": task.seed}
    entry |= {name: getattr(episode, name) for name in _EPISODE} | {"score": float(episode.score)}
    turns = [_turn_record(turn) for turn in episode.turns]
    if episode.status != "aborted":
        entry |= {name: getattr(episode, name) for name in _SCORED} | {"filters": sorted(episode.filters)}
        for name, key in (("advantages", "advantage"), ("keep", "keep"), ("penalties", "penalty")):
            values = getattr(episode, name)
            if len(values) == len(turns):
                for turn, value in zip(turns, values.tolist(), strict=True):
                    turn[key] = value
    record: dict[str, Any] = _plain(entry | {"turns": turns})
    return record


def _turn_record(turn: Turn) -> dict[str, Any]:
    return {
        "observation": turn.observation,
        "response": turn.text,
        "action": turn.action,
        "valid": turn.valid,
        "tool_call": turn.tool_call,
        "reward": float(turn.reward),
        "finish": turn.finish,
        "prompt_tokens": len(turn.prompt_ids),
        "response_tokens": len(turn.response_ids),
        "logp": _mean(turn.logps),
        "entropy": _mean(turn.entropies),
    }


def _mean(values: np.ndarray[Any, Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else math.nan


def _plain(value: Any) -> Any:
    """What strict JSON can hold: it has neither NaN nor infinity nor lone surrogates."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def well_formed(text: str) -> str:
    """``text`` with lone surrogates, which no strict JSON or UTF-8 reader accepts, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def printable(text: str) -> str:
    r"""``text`` with whatever acts on a terminal or hides (controls, formats, surrogates) written as ``\u{…}``."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else f"\\u{{{ord(character):x}}}"
        for character in text
    )


def notable(rollout: Rollout) -> dict[str, tuple[tuple[float, ...], Episode]]:
    """The best, the worst and a random episode of this rank.

    Returns:
        By name, a key and the episode. Over ranks, the one with the smallest key is the best, worst or random one of
        all: the choice does not depend on how episodes are spread over ranks.
    """
    if not rollout.episodes:
        return {}

    def order(item: Episode) -> tuple[int, int]:
        return item.group, item.index

    def ranked(reward: float) -> float:
        return reward if math.isfinite(reward) else math.inf

    keys: dict[str, Callable[[Episode], tuple[float, ...]]] = {
        "best": lambda item: (-ranked(item.reward), *order(item)),
        "worst": lambda item: (ranked(item.reward), *order(item)),
        "random": lambda item: (stream_seed("transcript", rollout.iteration, *order(item)), *order(item)),
    }
    chosen = {name: min(rollout.episodes, key=key) for name, key in keys.items()}
    return {name: (keys[name](episode), episode) for name, episode in chosen.items()}


def transcript(title: str, episode: Episode) -> str:
    """An episode in Markdown that shows the text exactly as text: no markup or control character of it takes effect.

    Args:
        title: heading.
        episode: as scored.
    """
    outcome = "solved" if episode.success else "not solved"
    parts = ", ".join(f"{name} {value:g}" for name, value in episode.parts.items())
    kind = f", type {_inline(episode.task.task_type)}" if episode.task.task_type else ""
    remarks = [
        f"**{outcome}** ({episode.status}{': ' + _inline(episode.reason) if episode.reason else ''}), "
        f"reward {episode.reward:.4g}" + (f" ({parts})" if parts else ""),
        f"task {_inline(episode.task.id)}{kind}, group {episode.group} "
        f"(reward {episode.group_mean:.4g} ± {episode.group_std:.4g}), episode {episode.index}",
    ]
    if episode.filters:
        remarks.append(f"filtered: {', '.join(sorted(episode.filters))}")
    if not episode.group_kept:
        remarks.append("the whole group was left out of training")
    blocks = [f"## {title}", "\n".join(f"- {remark}" for remark in remarks)]
    for number, turn in enumerate(episode.turns):
        blocks += [f"### Turn {number + 1}", _fenced(turn.observation)]
        blocks += [f"**answer** ({_remarks(episode, number)})", _fenced(turn.text)]
    return "\n\n".join(blocks) + "\n"


def _remarks(episode: Episode, number: int) -> str:
    turn = episode.turns[number]
    remarks = [f"{len(turn.response_ids)} tokens", f"entropy {_mean(turn.entropies):.3f}"]
    if len(episode.advantages) > number:
        remarks.append(f"advantage {episode.advantages[number]:+.3f}")
    if turn.finish == "length":
        remarks.append("cut at the length limit")
    if turn.action is None:
        remarks.append("**unparsable: no action found**")
    elif not turn.valid:
        remarks.append("**invalid**")
    return ", ".join(remarks)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text, so that the text cannot close it."""
    more = len(text) - SHOWN
    shown = printable(text[:SHOWN]) + (f"\n… ({more} more characters)" if more > 0 else "")
    fence = "`" * max(3, 1 + _longest_run(shown))
    return f"{fence}text\n{shown}\n{fence}"


def _inline(text: str) -> str:
    shown = printable(text[:200]).replace("\n", " ")
    fence = "`" * (1 + _longest_run(shown))
    return f"{fence} {shown} {fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def pick(candidates: Sequence[dict[str, tuple[tuple[float, ...], str]]]) -> dict[str, str]:
    """The transcripts with the smallest keys of all ranks, by name, in the order best, worst, random.

    Args:
        candidates: per rank, what :func:`notable` found, rendered.
    """
    names = [name for name in ("best", "worst", "random") if any(name in found for found in candidates)]
    return {name: min(found[name] for found in candidates if name in found)[1] for name in names}

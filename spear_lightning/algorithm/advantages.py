"""Advantages: how much better an episode, or a turn, did than its peers (§1.4).

Pure functions. Rewards may be tensors, arrays or plain sequences (floats are then float64); group ids anything
hashable. The result is a tensor of the rewards' precision.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values = Sequence[float] | npt.NDArray[Any] | Tensor
Ids = Sequence[Hashable] | npt.NDArray[Any] | Tensor
GiGPOMode = Literal["mean_norm", "mean_std_norm"]
Weighting = Literal["turn", "episode"]


class GroupMoments(NamedTuple):
    """Mean, sample standard deviation and size of each row's own group; each ``(rows,)``."""

    mean: Tensor
    std: Tensor
    size: Tensor


def group_moments(values: Values, groups: Ids) -> GroupMoments:
    """Mean, sample standard deviation (n−1) and size of the group that each row belongs to.

    Where all values of a group are equal, its mean is that value and its deviation 0, *exactly*: rounding must not turn
    a group without a signal into one with a tiny deviation, which the division by it would blow up.

    Args:
        values: ``(rows,)``.
        groups: id of each row's group.

    Returns:
        One entry per row. The deviation of a group of one is 0.

    Raises:
        ValueError: ``values`` and ``groups`` differ in length.
    """
    x = _floats(values)
    codes, count = _codes(groups, len(x))
    codes = codes.to(x.device)
    size = x.new_zeros(count).index_add(0, codes, torch.ones_like(x))
    mean = x.new_zeros(count).index_add(0, codes, x) / size
    member = x.new_zeros(count).index_copy(0, codes, x)  # some value of each group
    differing = x.new_zeros(count).index_add(0, codes, (x != member[codes]).to(x.dtype))
    mean = torch.where(differing == 0, member, mean)
    square = x.new_zeros(count).index_add(0, codes, (x - mean[codes]) ** 2)
    std = (square / (size - 1).clamp(min=1)).sqrt()
    return GroupMoments(mean[codes], std[codes], size[codes])


def grpo(rewards: Values, groups: Ids, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO, ``A = (R − mean_G)/(std_G + eps)``; without the division Dr.GRPO. A group of one has ``A = R``.

    Args:
        rewards: episode rewards, ``(episodes,)``.
        groups: id of each episode's group.
        normalize_std: divide by the group's sample standard deviation.
        eps: added to it.

    Returns:
        ``(episodes,)``.

    Raises:
        ValueError: the arguments differ in length.
    """
    return _relative(rewards, groups, normalize_std=normalize_std, eps=eps)


def grpo_turns(
    returns: Values,
    penalties: Values,
    groups: Ids,
    episodes: Ids,
    *,
    normalize_std: bool = True,
    weighting: Weighting = "turn",
    eps: float = 1e-6,
) -> Tensor:
    """GRPO over turns, as published: ``A_k = (s_k − mean)/(std + eps)`` with ``s_k = R − penalty_k``.

    A penalty is paid by the turn in which it was incurred, and by no other.

    Args:
        returns: reward R of the turn's episode without penalties, ``(turns,)``.
        penalties: the turn's own penalty, not negative, ``(turns,)``.
        groups: id of the turn's group.
        episodes: id of the turn's episode, unique at least within its group.
        normalize_std: divide by the standard deviation.
        weighting: ``turn`` takes mean and deviation over all turns of the group, of ``s``, so that long episodes weigh
            more (as published); ``episode`` over its episodes, of R. Where no R differs there is no deviation to divide
            by, and ``episode`` does not divide: a penalty alone must not be blown up to the size of a success.
        eps: added to the deviation.

    Returns:
        ``(turns,)``. A group of one turn (one episode) has ``A = s``.

    Raises:
        ValueError: the arguments differ in length, a penalty is negative, or ``weighting`` is unknown.
    """
    _check_option("grpo_turns", "weighting", weighting, ("turn", "episode"))
    totals, paid = _floats(returns), _floats(penalties)
    _check_rows("grpo_turns", "returns", totals, penalties=paid, groups=groups, episodes=episodes)
    if (paid < 0).any():
        raise ValueError(f"grpo_turns: penalties must not be negative, but one is {float(paid.min())}")
    return _over_turns(
        totals, totals - paid, groups, episodes, normalize_std=normalize_std, weighting=weighting, eps=eps
    )


def rloo(rewards: Values, groups: Ids) -> Tensor:
    """RLOO, ``A = R − mean of the other episodes of the group``. A group of one has ``A = R``.

    Args:
        rewards: episode rewards, ``(episodes,)``.
        groups: id of each episode's group.

    Returns:
        ``(episodes,)``.

    Raises:
        ValueError: the arguments differ in length.
    """
    x = _floats(rewards)
    mean, _, size = group_moments(x, groups)
    return torch.where(size > 1, (x - mean) * size / (size - 1).clamp(min=1), x)


def reinforce_plus_plus_baseline(rewards: Values, groups: Ids, *, eps: float = 1e-6) -> Tensor:
    """REINFORCE++ with the group mean as baseline: ``R − mean_G``, whitened over the whole batch.

    The whitening is over the episodes *given*; where a batch is spread over ranks, give all of it. A group of one keeps
    R before whitening, as in the other estimators. A batch without deviation is not divided.

    Args:
        rewards: episode rewards, ``(episodes,)``.
        groups: id of each episode's group.
        eps: added to the standard deviation of the batch.

    Returns:
        ``(episodes,)``.

    Raises:
        ValueError: the arguments differ in length.
    """
    centred = _relative(rewards, groups, normalize_std=False, eps=eps)
    return _relative(centred, [0] * len(centred), normalize_std=True, eps=eps)


def discounted_returns(step_rewards: Values, episodes: Ids, gamma: float) -> Tensor:
    """Discounted return of each turn within its episode, ``Ret_k = Σ_{j≥k} γ^{j−k} r_j``.

    Args:
        step_rewards: reward of each turn, ``(turns,)``; the turns of an episode in order (others may lie between them).
        episodes: id of each turn's episode.
        gamma: γ.

    Returns:
        ``(turns,)``.

    Raises:
        ValueError: the arguments differ in length.
    """
    rewards = _floats(step_rewards)
    codes, count = _codes(episodes, len(rewards))
    ahead = [0.0] * count  # Ret of the turn that follows, per episode, while walking backwards
    returns = [0.0] * len(rewards)
    pairs = list(zip(rewards.tolist(), codes.tolist(), strict=True))
    for row in reversed(range(len(pairs))):
        reward, episode = pairs[row]
        ahead[episode] = returns[row] = reward + gamma * ahead[episode]
    return torch.tensor(returns, dtype=rewards.dtype, device=rewards.device)


def gigpo(
    episode_returns: Values,
    step_returns: Values,
    groups: Ids,
    episodes: Ids,
    anchors: Ids,
    *,
    mode: GiGPOMode = "mean_norm",
    step_weight: float = 1.0,
    episode_weighting: Weighting = "turn",
    penalties: Values | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """GiGPO, ``A = A_episode + w·A_step``; all inputs have one row per turn.

    ``A_episode`` compares the episode's reward with its group. ``A_step`` compares the turn's discounted return with
    those of all turns of the group that stand on the same anchor (the same state, in whichever episode); a turn that
    stands there alone has nothing to compare with: 0.

    Args:
        episode_returns: reward of the turn's episode, ``(turns,)``.
        step_returns: discounted return of the turn (:func:`discounted_returns`), ``(turns,)``.
        groups: id of the turn's group.
        episodes: id of the turn's episode, unique at least within its group.
        anchors: name of the state the turn starts from.
        mode: ``mean_norm`` subtracts the mean; ``mean_std_norm`` also divides by the deviation. Both levels alike.
        step_weight: w.
        episode_weighting: ``turn`` takes the episode level's mean and deviation over turns, so that long episodes weigh
            more (as the reference does); ``episode`` over episodes, as in :func:`grpo_turns`.
        penalties: the turn's own, ``(turns,)``, taken off what the turn is worth at both levels, undiscounted; ``None``
            for none, or where the returns are less them already.
        eps: added to deviations.

    Returns:
        ``(turns,)``.

    Raises:
        ValueError: the arguments differ in length, or an option is unknown.
    """
    _check_option("gigpo", "mode", mode, ("mean_norm", "mean_std_norm"))
    _check_option("gigpo", "episode_weighting", episode_weighting, ("turn", "episode"))
    totals, steps = _floats(episode_returns), _floats(step_returns)
    paid = torch.zeros_like(totals) if penalties is None else _floats(penalties)
    rows = {"step_returns": steps, "groups": groups, "episodes": episodes, "anchors": anchors, "penalties": paid}
    _check_rows("gigpo", "episode_returns", totals, **rows)
    normalize = mode == "mean_std_norm"
    episode_level = _over_turns(
        totals, totals - paid, groups, episodes, normalize_std=normalize, weighting=episode_weighting, eps=eps
    )
    steps = steps - paid
    peers = list(zip(_as_list(groups), _as_list(anchors), strict=True))
    mean, std, size = group_moments(steps, peers)
    step_level = (steps - mean) / (std + eps) if normalize else steps - mean
    return episode_level + step_weight * torch.where(size > 1, step_level, 0.0)


def _over_turns(
    returns: Tensor,
    worth: Tensor,
    groups: Ids,
    episodes: Ids,
    *,
    normalize_std: bool,
    weighting: Weighting,
    eps: float,
) -> Tensor:
    """What each turn is worth against the moments of its group, over turns (of ``worth``) or episodes (``returns``)."""
    if weighting == "turn":
        return _relative(worth, groups, normalize_std=normalize_std, eps=eps)
    listed = _as_list(groups)
    codes, _ = _codes(list(zip(listed, _as_list(episodes), strict=True)), len(returns))
    first = np.unique(codes.numpy(), return_index=True)[1].tolist()  # a row of each episode, in the order of codes
    moments = group_moments(returns[first], [listed[row] for row in first])
    mean, std, size = (moment[codes.to(worth.device)] for moment in moments)
    divisor = torch.where(std > 0, std + eps, 1.0) if normalize_std else torch.ones_like(std)
    return torch.where(size > 1, (worth - mean) / divisor, worth)


def _relative(values: Values, groups: Ids, *, normalize_std: bool, eps: float) -> Tensor:
    """Each value against its group; a group of one keeps its value."""
    x = _floats(values)
    mean, std, size = group_moments(x, groups)
    relative = (x - mean) / (std + eps) if normalize_std else x - mean
    return torch.where(size > 1, relative, x)


def _floats(values: Values) -> Tensor:
    if not isinstance(values, Tensor | np.ndarray):
        return torch.tensor(list(values), dtype=torch.float64)
    tensor = torch.as_tensor(values)
    return tensor if tensor.is_floating_point() else tensor.double()


def _as_list(ids: Ids) -> list[Hashable]:
    return ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)


def _codes(ids: Ids, rows: int) -> tuple[Tensor, int]:
    """Number the distinct ids in order of appearance: the number of each row's id, and how many there are."""
    listed = _as_list(ids)
    if len(listed) != rows:
        raise ValueError(f"{rows} values but {len(listed)} ids: there must be one id per value")
    numbers: dict[Hashable, int] = {}
    codes = [numbers.setdefault(one, len(numbers)) for one in listed]
    return torch.tensor(codes, dtype=torch.long), len(numbers)


def _check_rows(function: str, first: str, values: Tensor, **others: Values | Ids) -> None:
    for name, rows in others.items():
        if len(rows) != len(values):
            raise ValueError(f"{function} needs one row per turn: {len(values)} {first} but {len(rows)} {name}")


def _check_option(function: str, key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: unknown {key} {value!r}: use one of {', '.join(allowed)}")

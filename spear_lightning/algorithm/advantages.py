"""Advantages: how much better an episode, or a turn, did than its peers (§1.4).

The functions are pure. Rewards may be tensors, arrays or plain sequences (floats are then float64); group ids anything
hashable. The result is a tensor with one entry per row, of the rewards' precision. All raise ``ValueError`` where
arguments differ in length, a penalty is negative or an option unknown. The classes are what a configuration names: all
take a table with one row per turn, and a turn is worth its episode's reward less the turn's own penalty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from spear_lightning.utils.ranges import Fraction, in_range

Values = Sequence[float] | npt.NDArray[Any] | Tensor
Ids = Sequence[Hashable] | npt.NDArray[Any] | Tensor
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Weighting = Literal["turn", "episode"]
GiGPOMode = Literal["mean_norm", "mean_std_norm"]


class GroupMoments(NamedTuple):
    """Mean, sample standard deviation (n−1; 0 of a group of one) and size of each row's own group; each ``(rows,)``."""

    mean: Tensor
    std: Tensor
    size: Tensor


def group_moments(values: Values, groups: Ids) -> GroupMoments:
    """The moments of the group that each row of ``values`` belongs to; ``groups`` holds the rows' ids.

    Where all values of a group are equal, its mean is that value and its deviation 0, *exactly*: rounding must not turn
    a group without a signal into one with a tiny deviation, which the division by it would blow up.
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
    """
    x = _floats(rewards)
    return _relative(x, group_moments(x, groups), normalize_std, eps)


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

    Each turn pays its own penalty, and no other's. A group of one turn (one episode) has ``A = s``.

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
    """
    _check_option("grpo_turns", "weighting", weighting, ("turn", "episode"))
    totals, paid = _floats(returns), _floats(penalties)
    _check_rows("grpo_turns", "returns", totals, penalties=paid, groups=groups, episodes=episodes)
    if (paid < 0).any():
        raise ValueError(f"grpo_turns: penalties must not be negative, but one is {float(paid.min())}")
    worth = totals - paid
    if weighting == "turn":
        return grpo(worth, groups, normalize_std=normalize_std, eps=eps)
    listed = _as_list(groups)
    codes, _ = _codes(list(zip(listed, _as_list(episodes), strict=True)), len(totals))
    first = np.unique(codes.numpy(), return_index=True)[1].tolist()  # a row of each episode, in the order of codes
    moments = group_moments(totals[first], [listed[row] for row in first])
    of_turns = GroupMoments(*(moment[codes.to(worth.device)] for moment in moments))
    return _relative(worth, of_turns, normalize_std, eps)


def discounted_returns(step_rewards: Values, episodes: Ids, gamma: float) -> Tensor:
    """Discounted return of each turn within its episode, ``Ret_k = Σ_{j≥k} γ^{j−k} r_j``, ``(turns,)``.

    The turns of an episode must be in order; turns of others may lie between them.
    """
    rewards = _floats(step_rewards)
    _check_rows("discounted_returns", "step_rewards", rewards, episodes=episodes)
    returns: list[float] = []  # backwards
    ahead: dict[Hashable, float] = {}  # Ret of the turn that follows, per episode
    for reward, episode in reversed(list(zip(rewards.tolist(), _as_list(episodes), strict=True))):
        ahead[episode] = reward + gamma * ahead.get(episode, 0.0)
        returns.append(ahead[episode])
    return torch.tensor(returns[::-1], dtype=rewards.dtype, device=rewards.device)


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

    ``A_episode`` compares the episode's reward with its group, as :func:`grpo_turns` does. ``A_step`` compares the
    turn's discounted return with those of all turns of the group that stand on the same anchor (the same state, in
    whichever episode); a turn that stands there alone has nothing to compare with: 0.

    Args:
        episode_returns: reward of the turn's episode, ``(turns,)``.
        step_returns: discounted return of the turn (:func:`discounted_returns`), ``(turns,)``.
        groups: id of the turn's group.
        episodes: id of the turn's episode, unique at least within its group.
        anchors: name of the state the turn starts from.
        mode: ``mean_norm`` subtracts the mean; ``mean_std_norm`` also divides by the deviation. Both levels alike.
        step_weight: w.
        episode_weighting: the ``weighting`` of :func:`grpo_turns` (the reference's is ``turn``).
        penalties: the turn's own, ``(turns,)``, taken off what it is worth at both levels, undiscounted; ``None``: 0.
        eps: added to deviations.
    """
    _check_option("gigpo", "mode", mode, ("mean_norm", "mean_std_norm"))
    _check_option("gigpo", "episode_weighting", episode_weighting, ("turn", "episode"))
    totals, steps = _floats(episode_returns), _floats(step_returns)
    paid = torch.zeros_like(totals) if penalties is None else _floats(penalties)
    rows = {"step_returns": steps, "groups": groups, "episodes": episodes, "anchors": anchors, "penalties": paid}
    _check_rows("gigpo", "episode_returns", totals, **rows)
    normalize = mode == "mean_std_norm"
    episode_level = grpo_turns(
        totals, paid, groups, episodes, normalize_std=normalize, weighting=episode_weighting, eps=eps
    )
    steps = steps - paid
    peers = group_moments(steps, list(zip(_as_list(groups), _as_list(anchors), strict=True)))
    step_level = torch.where(peers.size > 1, _relative(steps, peers, normalize, eps), 0.0)
    return episode_level + step_weight * step_level


# --- the estimators that a configuration names ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TurnTable:
    """The turns of a whole rollout batch, one row each; on several ranks, of all ranks.

    Attributes:
        returns: reward R of the turn's episode, penalties not taken off, float64 ``(turns,)``.
        penalties: of the turn itself, not negative, float64 ``(turns,)``.
        step_rewards: the environment's own reward of the turn, which GiGPO discounts, float64 ``(turns,)``.
        groups: number of the turn's group (task), int ``(turns,)``.
        episodes: number of the turn's episode, unique in the table, int ``(turns,)``; turns of an episode in order.
        anchors: name of the state each turn starts from; only GiGPO looks at it.
        samples: what is a training sample of its own, each ``turn`` (step-wise context) or each ``episode``
            (conversation context). With one sample an episode, baselines are over episodes, whatever their weighting.
    """

    returns: FloatArray
    penalties: FloatArray
    step_rewards: FloatArray
    groups: IntArray
    episodes: IntArray
    anchors: Sequence[str]
    samples: Weighting = "turn"

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in vars(self).items() if name != "samples"}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a turn table needs one row per turn in every column: {lengths}")

    def weighting(self, wanted: Weighting) -> Weighting:
        """What a baseline is taken over."""
        return wanted if self.samples == "turn" else "episode"

    def per_episode(self) -> tuple[FloatArray, IntArray, IntArray]:
        """R and group of each episode, and the number of each turn's episode in them."""
        _, first, episode = np.unique(self.episodes, return_index=True, return_inverse=True)
        return np.asarray(self.returns, dtype=np.float64)[first], self.groups[first], episode


class AdvantageEstimator(ABC):
    """Turns rewards into advantages."""

    @property
    def normalizes_std(self) -> bool:
        """Whether advantages are divided by a standard deviation; then :meth:`deviations` says by which."""
        return False

    @abstractmethod
    def __call__(self, table: TurnTable) -> FloatArray:
        """The advantage of each turn, float64 ``(turns,)``."""

    def deviations(self, table: TurnTable) -> FloatArray:
        """What the advantages of each group, in ascending order of its number, are divided by, ``(groups,)``.

        Replay divides recalibrated advantages by the median of these, so that they are on the scale of fresh ones.
        """
        return np.ones(len(np.unique(table.groups)))


@dataclass(frozen=True)
class GRPO(AdvantageEstimator):
    """Group-relative advantage (:func:`grpo_turns`); without the division it is Dr.GRPO.

    Args:
        normalize_std: divide by the group's standard deviation.
        weighting: mean and deviation over each ``turn`` (long episodes weigh more, as published) or ``episode``.
        eps: added to the deviation.
    """

    normalize_std: bool = True
    weighting: Weighting = "turn"
    eps: float = 1e-6

    @property
    @override
    def normalizes_std(self) -> bool:
        return self.normalize_std

    @override
    def __call__(self, table: TurnTable) -> FloatArray:
        rows = (table.returns, table.penalties, table.groups, table.episodes)
        weighting = table.weighting(self.weighting)
        return grpo_turns(*rows, normalize_std=self.normalize_std, weighting=weighting, eps=self.eps).numpy()

    @override
    def deviations(self, table: TurnTable) -> FloatArray:
        return _deviations(table, self.weighting) if self.normalize_std else super().deviations(table)


@dataclass(frozen=True)
class RLOO(AdvantageEstimator):
    """Leave-one-out: R less the mean R of the group's other episodes (0 if there are none), less the penalty."""

    @override
    def __call__(self, table: TurnTable) -> FloatArray:
        rewards, groups, episode = table.per_episode()
        x = torch.from_numpy(rewards)
        mean, _, size = group_moments(x, groups)
        advantages = torch.where(size > 1, (x - mean) * size / (size - 1).clamp(min=1), x)
        return advantages.numpy()[episode] - table.penalties


@dataclass(frozen=True)
class ReinforcePlusPlusBaseline(AdvantageEstimator):
    """REINFORCE++ with the group mean as baseline: ``R − mean_G``, whitened over the episodes of the whole batch.

    Penalties are divided likewise. All ranks must be in the table. A group of one keeps R before whitening, and a batch
    without deviation is not divided.

    Args:
        eps: added to the standard deviation of the batch.
    """

    eps: float = 1e-6
    normalizes_std = True

    @override
    def __call__(self, table: TurnTable) -> FloatArray:
        centred, std, episode = self._centred(table)
        whitened = grpo(centred, [0] * len(centred), eps=self.eps).numpy()
        return whitened[episode] - table.penalties / (std or 1.0)

    @override
    def deviations(self, table: TurnTable) -> FloatArray:
        return super().deviations(table) * self._centred(table)[1]

    def _centred(self, table: TurnTable) -> tuple[Tensor, float, IntArray]:
        """``R − mean_G`` of each episode, their standard deviation, and the number of each turn's episode in them."""
        rewards, groups, episode = table.per_episode()
        centred = grpo(rewards, groups, normalize_std=False)
        return centred, float(group_moments(centred, [0] * len(centred)).std[0]), episode


@in_range
@dataclass(frozen=True)
class GiGPO(AdvantageEstimator):
    """Group-in-group advantage (:func:`gigpo`).

    Args:
        gamma: γ of the discounted step returns, in [0, 1].
        mode: ``mean_norm``, or ``mean_std_norm`` to divide by standard deviations as well.
        step_weight: w, weight of the step level.
        episode_weighting: ``turn`` (long episodes weigh more in the baseline, as in the reference) or ``episode``.
        eps: added to standard deviations.
    """

    gamma: Fraction = 0.95
    mode: GiGPOMode = "mean_norm"
    step_weight: float = 1.0
    episode_weighting: Weighting = "turn"
    eps: float = 1e-6

    @property
    @override
    def normalizes_std(self) -> bool:
        return self.mode == "mean_std_norm"

    @override
    def __call__(self, table: TurnTable) -> FloatArray:
        steps = discounted_returns(table.step_rewards, table.episodes, self.gamma)
        return gigpo(
            table.returns,
            steps,
            table.groups,
            table.episodes,
            table.anchors,
            mode=self.mode,
            step_weight=self.step_weight,
            episode_weighting=table.weighting(self.episode_weighting),
            penalties=table.penalties,
            eps=self.eps,
        ).numpy()

    @override
    def deviations(self, table: TurnTable) -> FloatArray:
        return _deviations(table, self.episode_weighting) if self.normalizes_std else super().deviations(table)


def _deviations(table: TurnTable, weighting: Weighting) -> FloatArray:
    """Sample standard deviation of each group: over its turns, of what they are worth; or over its episodes, of R."""
    values, groups = table.returns - table.penalties, table.groups
    if table.weighting(weighting) == "episode":
        values, groups, _ = table.per_episode()
    first = np.unique(groups, return_index=True)[1]
    return group_moments(values, groups).std.numpy()[first]


def _relative(x: Tensor, of: GroupMoments, normalize_std: bool, eps: float) -> Tensor:
    """``x`` against its group: not divided where there is no deviation; what is alone keeps its value."""
    divisor = torch.where(of.std > 0, of.std + eps, 1.0) if normalize_std else torch.ones_like(of.std)
    return torch.where(of.size > 1, (x - of.mean) / divisor, x)


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

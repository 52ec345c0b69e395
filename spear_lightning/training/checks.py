"""What is wrong, or surprising, about a data module's settings taken together; told before anything is played."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn

from spear_lightning.algorithm import AdvantageEstimator, QualityFilters, ReplayBuffer, RewardComposer
from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.engines.base import RolloutEngine
from spear_lightning.rollout.specs import TrainingRollouts


def check_engine(engine: RolloutEngine) -> None:
    """Refuse an engine that cannot train.

    Raises:
        MisconfigurationException: it plays with weights that are not the policy's.
    """
    if not engine.trains:
        raise MisconfigurationException(
            f"data.engine is {type(engine).__name__}, which can evaluate and not train: use HuggingFaceEngine, or "
            "spear validate"
        )


def check_advantage(
    advantage: AdvantageEstimator, reward: RewardComposer, rollouts: TrainingRollouts, samples_are_turns: bool
) -> None:
    """Refuse what has no standard deviation; warn where one is divided by that penalties alone make.

    Args:
        advantage: the estimator.
        reward: of the run.
        rollouts: of the run.
        samples_are_turns: ``stepwise`` context: the deviation is over turns, and so over their penalties.

    Raises:
        MisconfigurationException: groups of one, divided by their deviation.
    """
    if not advantage.normalizes_std:
        return
    if rollouts.group_size == 1:
        raise MisconfigurationException(
            "data.rollouts.group_size is 1, and a single episode has no standard deviation to normalise by: raise "
            "group_size, or set data.advantage.init_args.normalize_std to false"
        )
    if samples_are_turns and reward.invalid_penalty > 0:
        rank_zero_warn(
            "data.advantage divides by the group's standard deviation over turns, and data.reward.invalid_penalty is "
            f"{reward.invalid_penalty:g}: in a group that fails (or wins) as a whole only penalties differ, and a "
            "valid turn there is reinforced as strongly as a winning one elsewhere. So it was published; to have the "
            "penalty weigh what it costs, set data.advantage.init_args.normalize_std to false (GiGPO: mode: mean_norm)."
        )


def check_replay(
    replay: ReplayBuffer, filters: QualityFilters, rollouts: TrainingRollouts, samples_per_episode: int
) -> None:
    """Refuse a buffer that can never replay; warn of one that waits for more than half of the most that it can hold.

    Args:
        replay: the buffer.
        filters: of the run; they keep a share of the groups.
        rollouts: of the run.
        samples_per_episode: most training samples of an episode: its turns in ``stepwise`` context, else 1.

    Raises:
        MisconfigurationException: what can be kept within ``max_age`` is less than what the schedule waits for.
    """
    groups = max(1, int(filters.keep_share * rollouts.tasks + 1e-9))
    size = rollouts.group_size
    best = size - 1 if samples_per_episode == 1 and size > 1 else size  # not all of a group are above its mean
    most = groups * best * samples_per_episode * replay.max_age
    needed = replay.schedule.needs(replay.capacity)
    counted = (
        f"data.replay waits for {needed} usable samples (capacity {replay.capacity}, {replay.schedule}), and within "
        f"max_age = {replay.max_age} iterations at most {most} can enter: {groups} groups (data.rollouts.tasks = "
        f"{rollouts.tasks}, data.filters.keep_share = {filters.keep_share:g}) x {best} episodes"
        + (f" x {samples_per_episode} turns" if samples_per_episode > 1 else " above the mean of their group")
    )
    if needed > most:
        raise MisconfigurationException(
            f"{counted}. It would never replay: lower data.replay's capacity or its schedule's ready, or raise max_age "
            "or data.rollouts.tasks"
        )
    if 2 * needed > most:
        rank_zero_warn(
            f"{counted}. It replays only while more than {needed / most:.0%} of these succeed: to imitate earlier, "
            "lower data.replay's capacity or its schedule's ready, or use the schedule Mix"
        )


def check_whole_weights(strategy: Strategy) -> None:
    """Refuse to play ahead if no rank has all weights.

    Raises:
        MisconfigurationException: the strategy partitions them; names the keys and the fix.
    """
    if isinstance(strategy, ZeroStrategy) and strategy.stage == 3:
        raise MisconfigurationException(
            "data.rollouts.max_staleness is 1, which plays with a copy of all weights while they are trained, and "
            "stage 3 of ZeroStrategy is for weights that do not fit on one rank: set data.rollouts.max_staleness to 0, "
            "or the strategy's stage to 0, 1 or 2"
        )

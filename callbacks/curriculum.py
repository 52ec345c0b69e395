"""The curriculum: learn to use tools first, then trust one's own successes (algorithm.md §1.2 and §3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from spear_lightning.algorithm import CosineDecay, CosineWarmup, Schedule
from spear_lightning.callbacks.logs import log_iteration
from spear_lightning.utils.ranges import AtLeast0, NotNegative, in_range

_Asked = tuple[Schedule | None, int | None, float | None]
"""A schedule as a whole, or length and largest weight of the cosine; ``None`` for what is not asked for."""

# A schedule that is 0 for so many iterations never wanted a replay buffer.
_HORIZON = 1000


@in_range
class CurriculumSchedule(Callback):
    r"""Sets the weight of self-imitation :math:`\gamma(t)` and of the tool reward :math:`\mu(t)` in each iteration.

    .. math::
        \gamma(t) &= \gamma_{max} \cdot \tfrac12 (1 - \cos(\pi t / T_{warm})) \text{ for } t \le T_{warm},
            \text{ then } \gamma_{max} \\
        \mu(t) &= \mu_{max} \cdot \tfrac12 (\cos(\pi t / T_{decay}) + 1) \text{ for } t \le T_{decay}, \text{ then } 0

    where :math:`t` is the number of the iteration (Lightning's ``trainer.current_epoch``), from 0. Both are set before
    the first episode of the iteration is played, and logged as ``curriculum/imitation_weight`` and
    ``curriculum/tool_reward_weight``. Without this callback :math:`\gamma = 1` and :math:`\mu = 0`; both are put back
    when ``fit`` ends.

    An overlay changes a part of the curriculum of the configuration below it by a second ``CurriculumSchedule``
    (``callbacks+:``). Of several in the list the last one acts and the others do nothing; what it leaves at ``None`` is
    what those before it say, and the default where none does.

    Args:
        imitation_warmup: :math:`T_{warm}` in iterations, by default 200; 0 starts with the full weight.
        tool_reward_decay: :math:`T_{decay}` in iterations, by default 200; 0 switches the tool reward off.
        imitation_max: :math:`\gamma_{max}`, by default 1; 0 switches self-imitation off, and no replay buffer is needed
            then.
        tool_reward_max: :math:`\mu_{max}`, by default 1, for tasks whose success reward is not of the order of 10.
        imitation: another schedule for :math:`\gamma`, in place of ``imitation_warmup`` and ``imitation_max``.
        tool_reward: another schedule for :math:`\mu`, in place of ``tool_reward_decay`` and ``tool_reward_max``:
            ``Constant`` and ``Zero`` of :mod:`spear_lightning.algorithm` are the paper's other two modes.

    Attributes:
        imitation: the schedule of :math:`\gamma`.
        tool_reward: the schedule of :math:`\mu`.

    Raises:
        ValueError: a number is out of range.
        MisconfigurationException: at the start of ``fit``, imitation is asked for and the data module has no replay
            buffer, or the module or the data module does not know the weight.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from spear_lightning.callbacks import CurriculumSchedule
        >>> curriculum = CurriculumSchedule(imitation_warmup=20, tool_reward_decay=10)
        >>> trainer = Trainer(max_epochs=40, callbacks=[curriculum], logger=False, enable_checkpointing=False)
        >>> [round(curriculum.imitation(t), 3) for t in (0, 10, 20, 39)]
        [0.0, 0.5, 1.0, 1.0]
        >>> [round(curriculum.tool_reward(t), 3) for t in (0, 5, 10, 39)]
        [1.0, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        imitation_warmup: NotNegative | None = None,
        tool_reward_decay: NotNegative | None = None,
        imitation_max: AtLeast0 | None = None,
        tool_reward_max: AtLeast0 | None = None,
        imitation: Schedule | None = None,
        tool_reward: Schedule | None = None,
    ) -> None:
        super().__init__()
        self._imitation: _Asked = (imitation, imitation_warmup, imitation_max)
        self._tool_reward: _Asked = (tool_reward, tool_reward_decay, tool_reward_max)
        self._acts = True
        self._before: tuple[float, float] | None = None
        self._follow([self])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out what is asked for; check that there is something to weight, before training time is spent."""
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        several = [callback for callback in callbacks if isinstance(callback, CurriculumSchedule)] or [self]
        self._acts = several[-1] is self
        if not self._acts:
            return
        self._follow(several)
        data = _datamodule(trainer)
        for owner, name in ((pl_module, "imitation_weight"), (data, "tool_reward_weight")):
            if not hasattr(owner, name):
                raise MisconfigurationException(
                    f"CurriculumSchedule sets `{name}`, which {type(owner).__name__} does not have: use SpearModule "
                    "and RolloutDataModule (or classes with that attribute), or remove CurriculumSchedule from "
                    "trainer.callbacks"
                )
        wanted = any(self.imitation(iteration) > 0 for iteration in range(_HORIZON))
        if wanted and getattr(data, "replay", None) is None:
            raise MisconfigurationException(
                "CurriculumSchedule asks for self-imitation, but there is no replay buffer (data.replay is null). "
                "Set data.replay to a ReplayBuffer; or, to schedule the tool reward alone, give CurriculumSchedule "
                "imitation_max: 0; or remove it from trainer.callbacks"
            )

        # Remembered here and not later: a checkpoint that is resumed brings weights which this callback had set.
        self._before = (float(pl_module.imitation_weight), float(data.tool_reward_weight))  # type: ignore[arg-type]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the weights also for an iteration that is resumed in its middle."""
        if self._acts:
            self._set(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set and log the weights of this iteration, before its first episode."""
        if not self._acts:
            return
        gamma, mu = self._set(trainer, pl_module)
        log_iteration(trainer, pl_module, {"curriculum/imitation_weight": gamma, "curriculum/tool_reward_weight": mu})

    def on_fit_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException | None = None
    ) -> None:
        """Leave the weights as they were found."""
        if self._before is not None:
            pl_module.imitation_weight, _datamodule(trainer).tool_reward_weight = self._before  # type: ignore[assignment]
            self._before = None

    on_exception = on_fit_end

    def _follow(self, schedules: Sequence[CurriculumSchedule]) -> None:
        """Take over what ``schedules`` ask for; of two that speak of the same weight the later one counts."""
        self.imitation: Schedule = _merged(CosineWarmup, [schedule._imitation for schedule in schedules])
        self.tool_reward: Schedule = _merged(CosineDecay, [schedule._tool_reward for schedule in schedules])

    def _set(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[float, float]:
        gamma = self.imitation(trainer.current_epoch)
        mu = self.tool_reward(trainer.current_epoch)
        pl_module.imitation_weight = gamma  # type: ignore[assignment]
        _datamodule(trainer).tool_reward_weight = mu
        return gamma, mu


def _datamodule(trainer: pl.Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]


def _merged(cosine: Callable[[int, float], Schedule], asked: Iterable[_Asked]) -> Schedule:
    whole, iterations, most = None, 200, 1.0
    for schedule, length, largest in asked:
        if length is not None or largest is not None:
            whole = None  # of an earlier one: it would stand in place of what this one asks for
        whole = whole if schedule is None else schedule
        iterations = iterations if length is None else length
        most = most if largest is None else largest
    return cosine(iterations, most) if whole is None else whole

"""A module and a data module that emit made-up rollouts through the hooks, inside a real Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from spear_lightning.environments.base import Split, Task
from spear_lightning.rollout.episode import Episode, Rollout, Turn
from spear_lightning.training.hooks import MicroBatchOutput, rollout_listeners, update_listeners


def make_turn(entropies: Sequence[float], text: str = "<action> look </action>", **changes: Any) -> Turn:
    count = len(entropies)
    values: dict[str, Any] = {
        "prompt_ids": np.arange(3, dtype=np.int32),
        "response_ids": np.arange(count, dtype=np.int32),
        "logps": np.full(count, -0.5, np.float32),
        "entropies": np.asarray(entropies, np.float32),
        "finish": "stop",
        "observation": "You see a desk.",
        "text": text,
        "action": "look",
        "valid": True,
        "tool_call": True,
        "anchor": "desk",
    }
    return Turn(**{**values, **changes})


def make_episode(
    turns: Sequence[Turn], *, group: int = 0, index: int = 0, kind: str = "pick", success: bool = False, **changes: Any
) -> Episode:
    reward = changes.pop("reward", 1.0 if success else 0.0)
    return Episode(
        task=Task(f"game-{group}", kind),
        group=group,
        index=index,
        iteration=changes.pop("iteration", 0),
        context="conversation",
        turns=list(turns),
        success=success,
        score=float(success),
        reward=reward,
        parts={"outcome": reward, "tool": 0.0, "format": 0.0, "penalty": 0.0},
        penalties=np.array([0.0 if turn.valid else 0.1 for turn in turns]),
        step_rewards=np.full(len(turns), reward / max(1, len(turns))),
        keep=np.ones(len(turns), bool),
        advantages=np.full(len(turns), reward - 0.5),
        group_mean=0.5,
        group_std=0.25,
        **changes,
    )


@dataclass
class Script:
    """What is played. Everything has a default, so that a test says only what it is about.

    Args:
        entropies: entropy of every generated token by iteration; the last one goes on.
        successes: training successes by iteration, of ``group`` episodes.
        held_out: held-out successes by evaluation, of ``games``.
        games: held-out games.
        group: episodes of a training rollout.
        parts: in how many parts the held-out games are played.
        batches: updates in an iteration.
        update_entropies: entropy that the update sees; the rollout's where it is ``None``.
        rollouts: complete rollouts to emit instead, by (split, iteration).
    """

    entropies: Sequence[float] = (1.0,)
    successes: Sequence[int] = (1,)
    held_out: Sequence[int] = (2, 6)
    games: int = 8
    group: int = 4
    parts: int = 2
    batches: int = 2
    update_entropies: Sequence[float] | None = None
    rollouts: Mapping[tuple[str, int], list[Episode]] = field(default_factory=dict)


def at(values: Sequence[Any], number: int) -> Any:
    return values[min(number, len(values) - 1)]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, play: Any, length: int) -> None:
        self._play, self._length = play, length

    def __iter__(self) -> Iterator[Any]:
        return self._play()

    def __len__(self) -> int:
        return self._length


class TinyData(LightningDataModule):
    def __init__(self, script: Script | None = None, replay: Any = None) -> None:
        super().__init__()
        self.script = script or Script()
        self.replay = replay
        self.tool_reward_weight = 0.0
        self.weights: list[tuple[float, float]] = []
        self.evaluated = 0

    def _loader(self, play: Any, length: int) -> Any:
        return torch.utils.data.DataLoader(Stream(play, length), batch_size=None)

    def train_dataloader(self) -> Any:
        return self._loader(self._iteration, self.script.batches)

    def val_dataloader(self) -> Any:
        return self._loader(lambda: self._evaluation("validation"), self.script.parts)

    def test_dataloader(self) -> Any:
        return self._loader(lambda: self._evaluation("test"), self.script.parts)

    def predict_dataloader(self) -> Any:
        return self.test_dataloader()

    def _iteration(self) -> Iterator[float]:
        assert self.trainer is not None
        number = self.trainer.current_epoch
        # What the rollout is played with: the curriculum must have set it by now.
        self.weights.append((self.trainer.lightning_module.imitation_weight, self.tool_reward_weight))
        script = self.script
        entropy = at(script.entropies, number)
        default = [
            make_episode(
                [make_turn([entropy] * (index + 1)), make_turn([entropy])],
                group=0,
                index=index,
                iteration=number,
                success=index < at(script.successes, number),
            )
            for index in range(script.group)
        ]
        self._emit("train", number, script.rollouts.get(("train", number), default))
        seen = entropy if script.update_entropies is None else at(script.update_entropies, number)
        for _ in range(script.batches):
            yield seen

    def _evaluation(self, split: Split) -> Iterator[float]:
        script, number = self.script, self.evaluated
        self.evaluated += 1
        won = at(script.held_out, number)
        default = [
            make_episode([make_turn([0.5])], group=game, success=game < won, kind="pick" if game % 2 else "heat")
            for game in range(script.games)
        ]
        episodes = script.rollouts.get((split, number), default)
        for part in range(script.parts):
            self._emit(split, number, episodes[part :: script.parts])
            yield 0.0

    def _emit(self, split: Split, iteration: int, episodes: list[Episode]) -> None:
        trainer = self.trainer
        assert trainer is not None
        mine = episodes[trainer.global_rank :: trainer.world_size]
        listeners = list(rollout_listeners(trainer))
        rollout = Rollout(split, iteration, mine, [], {"generation": 0.1, "environment": 0.2, "other": 0.0})
        for listener in listeners:
            listener.on_rollout_start(trainer, trainer.lightning_module, split, len(mine))
            for finished in range(len(mine)):
                listener.on_rollout_step(trainer, trainer.lightning_module, finished + 1, len(mine) - finished - 1)
        for listener in listeners:
            listener.on_rollout_end(trainer, trainer.lightning_module, rollout)


class TinyModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.imitation_weight = 1.0
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def training_step(self, batch: float, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = ((self.weight - 1) ** 2).sum()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        # One row of prompt, two tokens of turn 0, one of turn 2, and a masked token with a worthless value.
        output = MicroBatchOutput(
            source="fresh" if batch_idx % 2 == 0 else "replay",
            entropies=torch.tensor([[9.0, batch, batch, 3 * batch, float("nan")]]),
            mask=torch.tensor([[0, 1, 1, 1, 0]]),
            turns=torch.tensor([[-1, 0, 0, 2, 3]]),
            lengths=torch.tensor([5]),
        )
        for callback in update_listeners(self.trainer):
            callback.on_micro_batch_end(self.trainer, self, output)

    def validation_step(self, batch: float, batch_idx: int) -> None:
        pass

    def test_step(self, batch: float, batch_idx: int) -> None:
        pass

    def predict_step(self, batch: float, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(folder: Path, callbacks: Sequence[Any] = (), **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    bars = any(hasattr(callback, "get_metrics") for callback in callbacks)
    return Trainer(
        callbacks=list(callbacks),
        default_root_dir=str(folder),
        **{"enable_progress_bar": bars, **defaults, **arguments},
    )

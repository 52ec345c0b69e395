"""Training with and without generation in between, for the test that it makes no difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.engines.base import Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.policy.policy import Policy


class Alternating(LightningModule):
    """Raises the likelihood of given tokens; before each step each rank may generate, for a length of its own."""

    def __init__(self, policy: Policy, generate: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy, self.generate = policy, generate
        self.generated: list[int] = []

    def forward(self, *args: Any) -> Any:
        return self.policy(*args)

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> None:
        strategy: Any = self.trainer.strategy
        if self.generate:
            play(strategy, self)
        ids = ids + self.global_rank
        self.manual_backward(-strategy.engine(ids, torch.ones_like(ids)).logps.mean())
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-3)


def play(strategy: ZeroStrategy, module: Alternating) -> None:
    """One rollout phase: a prompt, and as many tokens as the rank's number asks for."""
    engine = HuggingFaceEngine()
    engine.sync(strategy.rollout_policy(module.policy), 0)
    sampling = Sampling(max_new_tokens=4 + 8 * module.global_rank, temperature=1.0, stop_ids=())
    request = Request("one", np.array([5, 6, 7], np.int32), sampling, seed=3)
    (completion,) = engine.generate([request])
    module.generated.append(len(completion.ids))
    strategy.release_rollout_policy()


def train(folder: Path, generate: bool, free_replica: bool) -> None:
    """Six updates under stage 3; leaves the weights as they are then."""
    module = Alternating(Policy("embedded"), generate)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ZeroStrategy(3, free_replica=free_replica, allgather_bucket_size=10**6, reduce_bucket_size=10**6),
        max_epochs=1,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    data = torch.randint(3, 90, (6, 2, 24), generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(list(data), batch_size=None))
    trainer.save_checkpoint(folder / "state")
    if generate:
        assert module.generated == [4 + 8 * module.global_rank] * 6

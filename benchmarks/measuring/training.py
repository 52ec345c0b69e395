"""One measured run: real updates of a fresh model on synthetic rows, under one strategy, and the bytes of each part."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from measuring.counters import AllocationPeak, MessageCounter, SavedActivations, storage_bytes
from spear_lightning.data.minibatches import IterationStream, Minibatch, StepPlan, build_minibatches
from spear_lightning.data.samples import Sample
from spear_lightning.distributed.collectives import rank
from spear_lightning.distributed.zero import ZeroStrategy
from spear_lightning.engines.base import Request, Sampling
from spear_lightning.engines.huggingface.engine import HuggingFaceEngine
from spear_lightning.policy.policy import LoRA, Policy
from spear_lightning.training.module import SpearModule

TOKENIZER = str(Path(__file__).resolve().parents[2] / "spear_lightning/policy/embedded")


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        name: of the case.
        strategy: ``single``, ``ddp`` or ``zero-1`` to ``zero-3``.
        ranks: processes.
        precision: ``trainer.precision``.
        gradient_checkpointing: ``policy.gradient_checkpointing``.
        model: Hugging Face configuration of the fresh model.
        row_tokens: length of each training row.
        micro_rows: rows of a micro-batch.
        micro_batches: of an update, on each rank.
        updates: optimizer steps; the last one is measured.
        bucket: elements of DeepSpeed's buckets.
        live: under ZeRO-3, elements that may stay gathered and that are fetched ahead; ``None`` keeps DeepSpeed's
            defaults, under which a model this small stays whole from the forward to the backward pass.
        attention: ``policy.attention``.
        lora: rank of adapters; 0 trains all weights.
        chunk_bytes: ``policy.chunk_bytes``.
    """

    name: str
    strategy: str
    ranks: int = 2
    precision: str = "32-true"
    gradient_checkpointing: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    row_tokens: int = 128
    micro_rows: int = 4
    micro_batches: int = 2
    updates: int = 2
    bucket: int = 4_000_000
    live: int | None = None
    attention: str = "sdpa"
    lora: int = 0
    chunk_bytes: int = 4 << 20

    def make_strategy(self) -> Strategy:
        """The strategy as the trainer takes it."""
        if self.strategy.startswith("zero"):
            stage = int(self.strategy[-1])
            strategy = ZeroStrategy(stage, allgather_bucket_size=self.bucket, reduce_bucket_size=self.bucket)
            if self.live is not None:
                names = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
                strategy.config["zero_optimization"] |= {f"stage3_{name}": self.live for name in names}
            return strategy
        return {"single": SingleDeviceStrategy("cpu"), "ddp": DDPStrategy()}[self.strategy]


class Rows(LightningDataModule):
    """Minibatches of random rows, the same number of equally long ones for every micro-batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.seed, self.max_response_length = case, 1, case.row_tokens

    def train_dataloader(self) -> IterationStream[Minibatch]:
        """The updates."""
        return IterationStream(self._play, self.case.updates)

    def _play(self) -> Iterator[Minibatch]:
        case = self.case
        for update in range(case.updates):
            rng = np.random.default_rng([update, rank()])
            rows = {f"{rank()}/{k}": self._row(rng) for k in range(case.micro_rows * case.micro_batches)}
            yield from build_minibatches(
                rows,
                {},
                plan=StepPlan(),
                max_tokens=case.micro_rows * case.row_tokens,
                pad_id=0,
                temperature=1.0,
                seed=1,
                iteration=update,
            )

    def _row(self, rng: np.random.Generator) -> Sample:
        tokens = self.case.row_tokens
        generated = np.arange(tokens) > 0  # the head is computed for all but the first token
        return Sample(
            ids=rng.integers(5, 600, tokens, dtype=np.int32),
            mask=generated,
            logps=np.where(generated, -6.0, 0.0).astype(np.float32),
            advantages=np.where(generated, rng.choice([-1.0, 1.0]), 0.0).astype(np.float32),
            turns=np.where(generated, 0, -1).astype(np.int16),
        )


class MeasuredModule(SpearModule):
    """The module itself, looked at while it trains: nothing it does is changed."""

    def __init__(self, case: Case, **settings: Any) -> None:
        super().__init__(**settings)
        self.case = case
        self.found: dict[str, float] = {}
        self.messages: dict[str, int] = {}
        self._update = -1

    def on_train_start(self) -> None:
        """What stands before the first update."""
        parameters = list(self.policy.parameters())
        partitioned = self._stage == 3
        held = [getattr(p, "ds_tensor", p) for p in parameters] if partitioned else parameters
        self.found["parameters"] = storage_bytes(held)
        counter = MessageCounter()
        with counter:
            acting = self.rollout_policy()
        self.found["messages of the replica"] = sum(counter.bytes.values())
        self.found["generation replica"] = 0 if acting is self.policy else storage_bytes(acting.parameters())
        self.found["generation cache"] = self._cache_bytes(acting)
        self.release_rollout_policy()

    def _cache_bytes(self, acting: Policy) -> int:
        engine = HuggingFaceEngine()
        engine.sync(acting, 0)
        prompts = np.random.default_rng(0).integers(5, 600, (8, 64), dtype=np.int32)
        sampling = Sampling(max_new_tokens=64)
        training = acting.training
        engine.generate([Request(str(k), prompt, sampling, seed=k) for k, prompt in enumerate(prompts)])
        acting.train(training)
        cache: Any = engine._rows.cache
        return storage_bytes(cache.buffers)

    @property
    def _stage(self) -> int:
        return getattr(self.trainer.strategy, "stage", 0)

    def training_step(self, minibatch: Minibatch, batch_idx: int) -> None:
        """One update; the last is counted, the one before it is profiled."""
        self._update = batch_idx
        last = batch_idx == self.case.updates - 1
        if not last:
            super().training_step(minibatch, batch_idx)
            self._after_step()
            return
        # The same update twice: counted, and then profiled, because counting would add to the allocations.
        counter, flops, peak = MessageCounter(), FlopCounterMode(display=False), AllocationPeak()
        with counter, flops:
            super().training_step(minibatch, batch_idx)
        self._after_step()
        # Gradients that the profiler has not seen come it does not see go: they are let go before.
        self.optimizers().zero_grad()
        standing = self.found["parameters"] + self.found["optimizer"] + storage_bytes(self._gradients())
        standing += self._bucket_bytes()
        with peak.watching():
            super().training_step(minibatch, batch_idx)
        self.found["operations of an update"] = flops.get_total_flops()
        self.found["peak of an update"] = standing + peak.peak
        self.messages = dict(counter.bytes)

    def _forward_pass(self, *args: Any, **kwargs: Any) -> Any:
        saved = SavedActivations(list(self.policy.parameters()))
        with saved.watching():
            stats = super()._forward_pass(*args, **kwargs)
        self.found["activations"] = saved.total
        return stats

    def _step(self, optimizer: Any) -> Any:
        self.found["gradients"] = storage_bytes(self._gradients())
        self.found["communication buckets"] = self._bucket_bytes()
        return super()._step(optimizer)

    def _gradients(self) -> Iterator[torch.Tensor | None]:
        """What stands between the last backward pass and the step."""
        yield from (p.grad for p in self.policy.parameters())
        inner = getattr(self.trainer.strategy, "model", None)
        optimizer = getattr(inner, "optimizer", None)
        for groups in ("averaged_gradients", "all_grad_tensors"):
            for group in (getattr(optimizer, groups, None) or {}).values():
                yield from group or ()
        yield getattr(optimizer, "grad_partitions_flat_buffer", None)

    def _bucket_bytes(self) -> int:
        model: Any = self.trainer.strategy.model
        if hasattr(model, "reducer"):  # DDP
            return storage_bytes(bucket.buffer() for bucket in model.reducer._get_zeros_like_grad_buckets())
        buckets = getattr(getattr(model, "optimizer", None), "ipg_buckets", {})
        buffers = []
        for bucket in buckets.values():
            buffer = bucket.buffer
            buffers += buffer if isinstance(buffer, list) else [buffer]
        return storage_bytes(buffers)

    def _after_step(self) -> None:
        model: Any = self.trainer.strategy.model
        optimizer = getattr(model, "optimizer", None) or self.trainer.optimizers[0]
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
        masters = masters or getattr(optimizer, "fp32_partitioned_groups_flat", None) or []
        state = getattr(optimizer, "optimizer", optimizer).state
        # Under ZeRO-3 the float32 weights may be the partitioned parameters themselves.
        weights = [getattr(p, "ds_tensor", p) for p in self.policy.parameters()]
        own = {weight.untyped_storage().data_ptr() for weight in weights}
        moments = [t for values in state.values() for t in values.values() if isinstance(t, torch.Tensor) and t.dim()]
        kept = [t for t in (*moments, *masters) if t.untyped_storage().data_ptr() not in own]
        self.found["optimizer"] = storage_bytes(kept)


def run(case: Case, folder: Path) -> None:
    """Run a case in this process, as one of its ranks.

    Args:
        case: what is run.
        folder: ``rank-K.json`` with what this rank has found is written there.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    policy = Policy(
        config=case.model,
        tokenizer=TOKENIZER,
        gradient_checkpointing=case.gradient_checkpointing,
        chunk_bytes=case.chunk_bytes,
        attention=case.attention,
        lora=LoRA(rank=case.lora) if case.lora else None,
    )
    module = MeasuredModule(case, policy=policy, optimizer=make_optimizer)
    trainer = Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=case.make_strategy(),
        precision=case.precision,  # type: ignore[arg-type]
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, Rows(case))
    checkpoint = folder / "checkpoint"
    trainer.save_checkpoint(checkpoint)
    module.found["checkpoint"] = _size(checkpoint)
    trainer.strategy.barrier()
    if rank() == 0:
        shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    result = {"bytes": module.found, "messages": module.messages}
    (folder / f"rank-{rank()}.json").write_text(json.dumps(result), encoding="utf-8")


def make_optimizer(parameters: Iterable[torch.nn.Parameter]) -> AdamW:
    """The optimizer of every case."""
    return AdamW(parameters, lr=1e-4)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)

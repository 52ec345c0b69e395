"""Callbacks: curriculum, entropy monitoring, checkpoints, rollout logs, progress, throughput and reports."""

from spear_lightning.callbacks.checkpoint import ShardedCheckpoint
from spear_lightning.callbacks.curriculum import CurriculumSchedule
from spear_lightning.callbacks.entropy import EntropyMonitor
from spear_lightning.callbacks.evaluation import EvaluationReport
from spear_lightning.callbacks.progress import RolloutProgress
from spear_lightning.callbacks.report import LearningCurve
from spear_lightning.callbacks.rollouts import RolloutLog
from spear_lightning.callbacks.throughput import ThroughputMonitor

__all__ = [
    "CurriculumSchedule",
    "EntropyMonitor",
    "EvaluationReport",
    "LearningCurve",
    "RolloutLog",
    "RolloutProgress",
    "ShardedCheckpoint",
    "ThroughputMonitor",
]

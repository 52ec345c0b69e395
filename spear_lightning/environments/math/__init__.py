"""Mathematics with verifiable answers, with or without a code interpreter."""

from spear_lightning.environments.math.files import HuggingFaceProblems, ProblemFile
from spear_lightning.environments.math.generated import GeneratedProblems
from spear_lightning.environments.math.graders import MathVerify, OwnScorer, StrictBox
from spear_lightning.environments.math.problems import Columns, ProblemSets
from spear_lightning.environments.math.suite import MathProblems

__all__ = [
    "Columns",
    "GeneratedProblems",
    "HuggingFaceProblems",
    "MathProblems",
    "MathVerify",
    "OwnScorer",
    "ProblemFile",
    "ProblemSets",
    "StrictBox",
]

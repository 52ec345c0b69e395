"""A few small ALFWorld games and demonstrations of them, made once."""

from __future__ import annotations

import pytest

pytest.importorskip("alfworld")

from spear_lightning.environments.alfworld.generator import SceneSize
from spear_lightning.environments.alfworld.suite import ALFWorld
from spear_lightning.environments.expert import DemonstrationNoise
from spear_lightning.sft.demonstrations import ExpertDemonstrations, Transcript

STRAYING = DemonstrationNoise(detour=0.1, waste=0.1, mistake=0.1, invalid=0.1)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> ALFWorld:
    """Twelve small training games, two of each type, and six held-out ones."""
    games = ALFWorld(
        cache_dir=str(tmp_path_factory.mktemp("sft-games")),
        train=12,
        validation=6,
        test=1,
        scene=SceneSize(receptacles=(4, 7), distractors=(1, 3)),
    )
    games.prepare()
    return games


@pytest.fixture(scope="session")
def transcripts(suite: ALFWorld) -> list[Transcript]:
    """Each training game played once, with all ways of straying."""
    return ExpertDemonstrations(noise=STRAYING, repetitions=1).play(suite, suite.tasks("train"), workers=0, seed=5)

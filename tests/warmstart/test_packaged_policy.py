from __future__ import annotations

from importlib import resources
from pathlib import Path

from spear_lightning.policy import Policy
from spear_lightning.rollout.transcript import TranscriptAgent

FOLDER = Path(str(resources.files("spear_lightning.warmstart") / "policy"))


def test_the_packaged_policy_loads_and_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 5 * 2**20
    policy = Policy(model="embedded")
    agent = TranscriptAgent()
    agent.bind(policy.tokenizer)
    assert len(agent.response_ids("go to desk 1")) == 4
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "seed" in card
    assert "temperature 1" in card

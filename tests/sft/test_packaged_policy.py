from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from spear_lightning.agents.transcript import TranscriptAgent
from spear_lightning.policy.policy import Policy
from spear_lightning.sft.tokenizer import splitting_pattern

FOLDER = Path(str(resources.files("spear_lightning.policy") / "embedded"))
BYTE, PLAIN_WORD = re.compile("<0x[0-9A-F]{2}>"), re.compile(" [a-z]+")


def test_the_packaged_policy_loads_and_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 5 * 2**20
    policy = Policy(model="embedded")
    agent = TranscriptAgent()
    agent.bind(policy.tokenizer)
    assert len(agent.response_ids("go to desk 1")) == 4
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "seed" in card
    assert "temperature 1" in card


def test_the_packaged_tokenizer_splits_as_a_newly_built_one_would() -> None:
    tokenizer = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    units = [token for token in tokenizer["model"]["vocab"] if token not in special and not BYTE.fullmatch(token)]
    compound = [unit for unit in units if not PLAIN_WORD.fullmatch(unit)]
    assert tokenizer["pre_tokenizer"]["pattern"]["Regex"] == splitting_pattern(compound)

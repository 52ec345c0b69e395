"""What CONTRIBUTING.md says is so: its files and names are there, its example is a loss that trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from spear_lightning.algorithm import PolicyLoss, aggregate

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_files_it_names_are_there_and_define_what_it_says() -> None:
    paths = set(re.findall(r"`((?:spear_lightning|callbacks|tests)/[\w/]+\.py)`", TEXT))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    for subject, path in re.findall(r"a subclass of `(\w+)` in `([\w/]+\.py)`", TEXT):
        assert f"class {subject}(" in (ROOT / path).read_text(encoding="utf-8")
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", TEXT):
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(class|def) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_package_is_in_its_table() -> None:
    table = TEXT[TEXT.index("| package |") : TEXT.index("| question |")]
    named = {
        name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert named == {path.parent.name for path in (ROOT / "spear_lightning").glob("*/__init__.py")}


def test_its_loss_is_composed_by_class_path_and_reinforces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_loss.py").write_text(code, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser()
    parser.add_subclass_arguments(PolicyLoss, "loss")
    loss = parser.instantiate_classes(parser.parse_object(yaml.safe_load(text)["model"])).loss
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    logp = logits.log_softmax(-1)[..., 0]
    mask = torch.tensor([[1.0, 0.0]])
    told = loss(logp, logp.detach(), torch.tensor([[1.0, 5.0]]), mask, entropies=torch.ones(1, 2))
    aggregate(told.loss, mask, "token-mean").backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 0], 2 * torch.tensor([-2 / 3, 1 / 3, 1 / 3]))
    assert (logits.grad[0, 1] == 0).all()

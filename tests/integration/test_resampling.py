"""Dynamic sampling in whole iterations on a toy: what is played, what is learned from, what is logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.resampled import train
from tests.integration.runs import curve, weights
from tests.processes import start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.warns(UserWarning, match="only .* groups of data.rollouts.tasks=4") as told:
        train(folder)
    assert len([warning for warning in told if "data.rollouts.resample" in str(warning.message)]) == 1
    return folder


def iterations(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return json.loads((folder / f"iterations-{rank}.json").read_text())


def test_flat_groups_are_played_again_and_not_learned_from(whole):
    found = []
    for row, iteration in zip(curve(whole), iterations(whole), strict=True):
        episodes = iteration["episodes"]
        groups = {group: (task, std, kept) for group, _, task, _, std, kept in episodes}
        assert len(episodes) == sum(iteration["rounds"]) == 4 * len(groups)
        assert sorted(groups) == list(range(len(groups)))
        assert len({task for task, _, _ in groups.values()}) == len(groups)
        assert all(kept == (std > 0) for _, std, kept in groups.values())
        assert iteration["batch"] == [std > 0 for *_, std, _ in episodes]
        signal = sum(kept for _, _, kept in groups.values())
        assert iteration["rounds"][0] == 16
        assert signal == 4 or len(iteration["rounds"]) == 3
        assert float(row["rollout/signal_groups"]) == signal
        assert float(row["rollout/resampled_groups"]) == len(groups) - 4
        assert float(row["rollout/resample_rounds"]) == len(iteration["rounds"]) - 1
        assert float(row["rollout/episodes"]) == len(episodes)
        assert float(row["rollout/success"]) == pytest.approx(sum(e[3] for e in episodes) / len(episodes))
        assert float(row["filter/group_kept"]) == pytest.approx(signal / len(groups))
        assert float(row["update/grad_norm"]) > 0
        found.append((signal, len(iteration["rounds"])))
    full = [rounds for signal, rounds in found if signal == 4]
    assert max(full) > 1, "no iteration was filled by its further rounds: the test proves nothing"
    assert len(full) < 3, "none reached the bound: the test proves nothing"


def test_without_it_nothing_is_played_or_logged(tmp_path):
    train(tmp_path, epochs=1, resample=0)
    assert [iteration["rounds"] for iteration in iterations(tmp_path)] == [[16]]
    assert not [name for name in curve(tmp_path)[0] if "resample" in name or "signal" in name]


@pytest.mark.filterwarnings("ignore:after .* further rounds")
def test_a_resumed_run_plays_and_learns_the_same(whole, tmp_path):
    train(tmp_path, epochs=1)
    train(tmp_path, checkpoint=tmp_path / "last.ckpt")
    assert [i["episodes"] for i in iterations(tmp_path)] == [i["episodes"] for i in iterations(whole)[1:]]
    assert curve(tmp_path) == curve(whole)
    for name, tensor in weights(whole / "last.ckpt").items():
        torch.testing.assert_close(weights(tmp_path / "last.ckpt")[name], tensor, rtol=0, atol=0)


def test_two_ranks_play_and_learn_what_one_does(whole, tmp_path):
    ranks = start_ranks(2, train_on_two, tmp_path, folder=tmp_path / "printed")
    assert ranks.join() == [0, 0], ranks.printed()
    both = zip(iterations(whole), iterations(tmp_path, 0), iterations(tmp_path, 1), strict=True)
    for one, first, second in both:
        assert sorted(first["episodes"] + second["episodes"]) == one["episodes"]
        assert [sum(pair) for pair in zip(first["rounds"], second["rounds"], strict=True)] == one["rounds"]
    for single, double in zip(curve(whole), curve(tmp_path), strict=True):
        for name in ("rollout/success", "rollout/resampled_groups", "rollout/signal_groups", "replay/used"):
            assert float(single[name]) == pytest.approx(float(double[name]), abs=1e-6), name
    for name, tensor in weights(whole / "last.ckpt").items():
        torch.testing.assert_close(weights(tmp_path / "last.ckpt")[name], tensor, rtol=1e-5, atol=1e-5)


def train_on_two(folder: Path) -> None:
    train(folder, ranks=2)

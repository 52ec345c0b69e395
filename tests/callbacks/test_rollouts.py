import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from spear_lightning.callbacks import RolloutLog
from spear_lightning.callbacks.transcripts import notable, pick, printable, transcript, well_formed
from spear_lightning.rollout.episode import Episode, Rollout
from tests.callbacks.tiny import Script, TinyData, TinyModule, make_episode, make_trainer, make_turn

HOSTILE = [
    "",
    "lone \ud800 surrogate \udfff",
    'quotes " and \\ backslashes',
    "new\nline \r carriage \x85 next \u2028 separator \u2029 paragraph",
    "\x00\x1b[2J\x1b]0;title\x07 controls",
    "``` ```` closes fences ````` <script>alert(1)</script>",
    "closes\n```\n````\n\n# and goes on",
    "\u202e right to left",
    "x" * 10_000,
    "emoji \U0001f600",
]


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("ascii").splitlines()]


def fit(folder: Path, log: RolloutLog, script: Script | None = None, **arguments: Any) -> Any:
    trainer = make_trainer(folder, [log], **arguments)
    trainer.fit(TinyModule(), datamodule=TinyData(script))
    return trainer


def test_every_episode_of_every_split_is_written(tmp_path: Path) -> None:
    trainer = fit(tmp_path, RolloutLog(tmp_path / "log"), limit_val_batches=1.0, num_sanity_val_steps=-1)
    trainer.test(TinyModule(), datamodule=TinyData(), verbose=False)
    names = sorted(str(path.relative_to(tmp_path / "log")) for path in (tmp_path / "log").rglob("*.*"))
    assert names == [
        "test/iteration-00002-rank-0-part-1.jsonl",
        "test/iteration-00002-rank-0.jsonl",
        "train/iteration-00000-rank-0.jsonl",
        "train/iteration-00000.md",
        "train/iteration-00001-rank-0.jsonl",
        "train/iteration-00001.md",
        # before training, after one iteration, after two; each played in two parts
        "validation/iteration-00000-rank-0-part-1.jsonl",
        "validation/iteration-00000-rank-0.jsonl",
        "validation/iteration-00001-rank-0-part-1.jsonl",
        "validation/iteration-00001-rank-0.jsonl",
        "validation/iteration-00002-rank-0-part-1.jsonl",
        "validation/iteration-00002-rank-0.jsonl",
    ]
    assert [len(read(tmp_path / "log" / name)) for name in names if "jsonl" in name] == [4] * 10


def test_a_record_holds_what_was_played_and_what_became_of_it(tmp_path: Path) -> None:
    turns = [
        make_turn([1.0, 2.0, float("nan")], text="<action> go </action>", action="go", reward=0.5),
        make_turn([4.0], action=None, valid=False, tool_call=False, finish="length"),
    ]
    scored = make_episode(turns, group=3, index=2, success=True, filters=frozenset({"overlong", "incomplete"}))
    scored.keep = np.array([True, False])
    scored.advantages = np.array([0.25, -0.5])
    fit(tmp_path, RolloutLog(tmp_path), Script(rollouts={("train", 0): [scored]}), max_epochs=1)
    (entry,) = read(tmp_path / "train" / "iteration-00000-rank-0.jsonl")
    first, second = entry.pop("turns")
    assert entry == {
        "split": "train",
        "iteration": 0,
        "rank": 0,
        "task": {"id": "game-3", "task_type": "pick", "seed": 0},
        "group": 3,
        "index": 2,
        "context": "conversation",
        "weight_version": 0,
        "status": "finished",
        "reason": "",
        "success": True,
        "score": 1.0,
        "reward": 1.0,
        "parts": {"outcome": 1.0, "tool": 0.0, "format": 0.0, "penalty": 0.0},
        "filters": ["incomplete", "overlong"],
        "group_kept": True,
        "group_mean": 0.5,
        "group_std": 0.25,
    }
    assert first == {
        "observation": "You see a desk.",
        "response": "<action> go </action>",
        "action": "go",
        "valid": True,
        "tool_call": True,
        "reward": 0.5,
        "finish": "stop",
        "prompt_tokens": 3,
        "response_tokens": 3,
        "logp": -0.5,
        "entropy": 1.5,
        "advantage": 0.25,
        "keep": True,
        "penalty": 0.0,
    }
    assert (second["action"], second["valid"], second["finish"], second["keep"]) == (None, False, "length", False)


def test_hostile_text_is_one_line_of_strict_json(tmp_path: Path) -> None:
    episodes = [
        make_episode([make_turn([], text=text, observation=text, action=text)], index=index, reward=reward)
        for index, (text, reward) in enumerate(zip(HOSTILE, [float("nan"), float("inf")] + [0.0] * 8, strict=True))
    ]
    fit(tmp_path, RolloutLog(tmp_path), Script(rollouts={("train", 0): episodes}), max_epochs=1)
    entries = read(tmp_path / "train" / "iteration-00000-rank-0.jsonl")
    assert len(entries) == len(HOSTILE)
    for text, entry in zip(HOSTILE, entries, strict=True):
        (turn,) = entry["turns"]
        expected = text if "\ud800" not in text else "lone \ufffd surrogate \ufffd"
        assert [turn[name] for name in ("observation", "response", "action")] == [expected] * 3
        turn["response"].encode("utf-8")
        assert turn["entropy"] is None
    assert [entry["reward"] for entry in entries[:3]] == [None, None, 0.0]


def test_aborted_episodes_are_written_without_a_reward(tmp_path: Path) -> None:
    aborted = make_episode([make_turn([1.0])])
    aborted.status, aborted.reason = "aborted", "the worker died \ud800"
    log = RolloutLog(tmp_path)
    trainer = make_trainer(tmp_path, [log])
    log.setup(trainer, TinyModule(), "fit")
    rollout = Rollout("train", 0, [], [aborted], {})
    log.on_rollout_end(trainer, TinyModule(), rollout)
    (entry,) = read(tmp_path / "train" / "iteration-00000-rank-0.jsonl")
    assert entry["status"] == "aborted"
    assert entry["reason"] == "the worker died \ufffd"
    assert "reward" not in entry
    assert "advantage" not in entry["turns"][0]


def test_iterations_and_splits_can_be_left_out(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "log", every_n_iterations=2, transcripts=False, splits=["train"])
    fit(tmp_path, log, limit_val_batches=1.0, max_epochs=4)
    names = sorted(str(path.relative_to(tmp_path / "log")) for path in (tmp_path / "log").rglob("*.*"))
    assert names == ["train/iteration-00000-rank-0.jsonl", "train/iteration-00002-rank-0.jsonl"]


def test_playing_an_iteration_again_replaces_its_file(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    fit(tmp_path, log, Script(group=4), max_epochs=1)
    fit(tmp_path, log, Script(group=2), max_epochs=1)
    assert [path.name for path in (tmp_path / "train").glob("*.jsonl")] == ["iteration-00000-rank-0.jsonl"]
    assert len(read(tmp_path / "train" / "iteration-00000-rank-0.jsonl")) == 2


def test_the_default_directory_is_in_the_log_directory(tmp_path: Path) -> None:
    fit(tmp_path, RolloutLog(), logger=CSVLogger(tmp_path, name="run", version="one"), max_epochs=1)
    assert (tmp_path / "run" / "one" / "rollouts" / "train" / "iteration-00000-rank-0.jsonl").exists()
    fit(tmp_path, RolloutLog(), max_epochs=1)
    assert (tmp_path / "rollouts" / "train" / "iteration-00000-rank-0.jsonl").exists()


def test_transcripts_show_the_best_the_worst_and_a_random_episode(tmp_path: Path) -> None:
    rewards = [0.5, 2.0, -1.0, 0.25]
    episodes = [
        make_episode([make_turn([1.0], text=f"answer {index}")], index=index, reward=reward)
        for index, reward in enumerate(rewards)
    ]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, RolloutLog(tmp_path), Script(rollouts={("train", 0): episodes}), max_epochs=1, logger=logger)
    text = (tmp_path / "train" / "iteration-00000.md").read_text()
    best, worst, chosen = text.split("## Iteration 0: ")[1:]
    assert "best episode" in best
    assert "answer 1" in best
    assert "worst episode" in worst
    assert "answer 2" in worst
    assert "random episode" in chosen

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert {f"rollouts/{name}/text_summary" for name in ("best", "worst", "random")} <= set(events.Tags()["tensors"])
    (event,) = events.Tensors("rollouts/best/text_summary")
    assert b"answer 1" in event.tensor_proto.string_val[0]


def test_the_choice_does_not_depend_on_how_ranks_share_the_episodes() -> None:
    rng = random.Random(0)
    episodes = [make_episode([], group=g, index=i, reward=rng.choice([0.0, 1.0])) for g in range(6) for i in range(4)]

    def chosen(parts: list[list[Episode]]) -> dict[str, str]:
        def rendered(part: list[Episode]) -> dict[str, tuple[tuple[float, ...], str]]:
            found = notable(Rollout("train", 7, part, [], {})).items()
            return {name: (key, f"{e.group}/{e.index}") for name, (key, e) in found}

        return pick([rendered(part) for part in parts])

    whole = chosen([episodes])
    assert list(whole) == ["best", "worst", "random"]
    for size in (2, 3, 30):
        assert chosen([episodes[rank::size] for rank in range(size)]) == whole
    others = {chosen([episodes[: 4 * (count + 1)]])["random"] for count in range(6)}
    assert len(others) > 1


def test_a_transcript_shows_hostile_text_as_text() -> None:
    for text in HOSTILE:
        turn = make_turn([1.0], text=text, observation=text)
        shown = transcript("title", make_episode([turn]))
        shown.encode("utf-8")
        assert not any(ord(character) < 32 and character not in "\n\t" for character in shown)
        assert "\u202e" not in shown
        fence = next(line for line in shown.splitlines() if line.startswith("```"))
        fence = fence.removesuffix("text")
        assert sum(line == fence for line in shown.splitlines()) == 2, (
            "opened and closed once for each of the two texts"
        )
        assert len(shown) < 6_000
    assert "8000 more characters" in transcript("title", make_episode([make_turn([1.0], text="x" * 10_000)]))


def test_a_transcript_says_what_went_wrong() -> None:
    turns = [
        make_turn([1.0], valid=False),
        make_turn([float("nan")], action=None, valid=False, finish="length"),
    ]
    shown = transcript("title", make_episode(turns, filters=frozenset({"repetitive"}), group_kept=False))
    assert "**invalid**" in shown
    assert "unparsable: no action found" in shown
    assert "cut at the length limit" in shown
    assert "filtered: repetitive" in shown
    assert "left out of training" in shown
    assert "not solved" in shown


def test_well_formed_keeps_pairs_and_printable_keeps_words() -> None:
    assert well_formed("a\ud83d\ude00b\ud83d") == "a\U0001f600b\ufffd"
    assert printable("é 漢 \x1b[0m\u200b") == "é 漢 \\u{1b}[0m\\u{200b}"


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_directory_that_cannot_be_made_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    data = TinyData()
    with pytest.raises(MisconfigurationException, match=r"cannot write to .*file/log.*set RolloutLog.directory"):
        make_trainer(tmp_path, [RolloutLog(tmp_path / "file" / "log")]).fit(TinyModule(), datamodule=data)
    assert data.weights == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_iterations": 0}, "every_n_iterations must be at least 1"),
        ({"splits": ["train", "dev"]}, "splits may hold train, validation, test; not 'dev'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=rf"RolloutLog(: |\.){message}"):
        RolloutLog(**arguments)

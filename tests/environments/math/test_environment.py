from __future__ import annotations

import itertools
import json
import logging
import pickle
import random
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from gymnasium.error import ResetNeeded

from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.engines.base import Sampling
from spear_lightning.environments.base import Task
from spear_lightning.environments.math import (
    GeneratedProblems,
    MathProblems,
    MathVerify,
    ProblemFile,
    ProblemSets,
    StrictBox,
)
from spear_lightning.environments.math.environment import Interpreter, MathEnv
from spear_lightning.environments.pool import EnvironmentPool, EnvironmentPoolError
from spear_lightning.environments.tools import CODE_INTERPRETER, parse_calls, read_results
from spear_lightning.rollout.collector import Collector
from spear_lightning.rollout.specs import EpisodeSpec
from tests.agents.chats import chat_tokenizer
from tests.agents.players import ScriptedEngine
from tests.sandbox.sandboxes import Fragile, Ran

MONTY = "tests.sandbox.sandboxes.MontySandbox"
FRAGILE = "tests.sandbox.sandboxes.Fragile"


def call(code: object) -> str:
    return f"<tool_call>{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}</tool_call>"


@pytest.fixture
def suite() -> MathProblems:
    sums = {split: GeneratedProblems(["chain_sum"], 4, seed) for split, seed in (("train", 0), ("test", 100))}
    return MathProblems(**sums, validation=GeneratedProblems(["gcd"], 2), sandbox=MONTY, max_turns=4)


@pytest.fixture
def environment(suite: MathProblems) -> Iterator[MathEnv]:
    yield suite.make()
    assert suite._interpreter is not None
    suite._interpreter.close()


def test_an_episode_is_calls_and_an_answer(environment: MathEnv, suite: MathProblems) -> None:
    problem, _ = suite.pose("train-2")
    text, info = environment.reset(options={"task": "train-2"})
    assert text == problem.question + "\n\n" + suite.instruction
    assert info == {"won": False}
    text, reward, over, cut, _ = environment.step(
        "I add." + call("print(1 + 1)\nprint('two')") + call("1 / 0") + call(3) + "<tool_call>{</tool_call>" + call("1")
    )
    assert (reward, over, cut) == (0.0, False, False)
    results = read_results(text)
    assert results is not None
    names, answers = zip(*results, strict=True)
    assert set(names) == {"code_interpreter"}
    assert answers[0] == "2\ntwo"
    assert answers[1].startswith("Error: ZeroDivisionError")
    assert answers[2] == "Error: the argument code of code_interpreter must be of type string"
    assert answers[3].startswith("Error: the tool call is not valid JSON")
    assert answers[4].startswith("The program ended and printed nothing.")
    _, reward, over, cut, info = environment.step(rf"It is \boxed{{{problem.answer}}}.")
    assert (reward, over, cut, info["won"]) == (1.0, True, False, True)
    assert info["answer"] == problem.answer, "for majority votes"
    with pytest.raises(ResetNeeded, match="the episode is over: call reset first"):
        environment.step("more")


def test_wrong_answers_and_nonsense_end_the_episode_without_reward(environment: MathEnv) -> None:
    for text in ("", "I do not know", r"\boxed{no}", "\ud800" * 100_000):
        environment.reset(options={"task": "train-0"})
        _, reward, over, cut, info = environment.step(text)
        assert (reward, over, cut, info["won"]) == (0.0, True, False, False)


def test_the_last_turn_runs_nothing(environment: MathEnv) -> None:
    environment.reset(options={"task": "train-0"})
    for _ in range(3):
        assert environment.step(call("print(1)"))[2:4] == (False, False)
    assert environment.step(call("print(1)"))[:4] == ("", 0.0, False, True)


def test_without_a_tool_every_message_is_an_answer(suite: MathProblems) -> None:
    alone = MathProblems(**{**suite.sources, "tool": None, "instruction": "", "sandbox": "no.such.thing"})  # type: ignore[arg-type]
    environment = alone.make()
    problem, _ = alone.pose("train-0")
    assert environment.reset(options={"task": "train-0"})[0] == problem.question
    assert environment.step(call("print(1)"))[2:4] == (True, False)


def test_calls_that_take_too_long_are_not_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.count(0, 20)
    monkeypatch.setattr("spear_lightning.environments.math.environment.time.monotonic", lambda: next(times))
    suite = MathProblems(sandbox=FRAGILE, code_seconds=30)
    environment = suite.make()
    environment.reset(options={"task": "train-0"})
    results = read_results(environment.step(call("a") + call("b") + call("c"))[0])
    assert [content for _, content in results or []] == [
        "a",
        *["Error: not run: the calls before it took too long"] * 2,
    ]


# --- the sandbox ---------------------------------------------------------------------------------------------------


def test_a_sandbox_that_breaks_is_opened_again_once() -> None:
    Fragile.opened = Fragile.closed = 0
    interpreter = Interpreter(Fragile, output_characters=100)
    assert interpreter.run("break once") == "break once"
    assert (Fragile.opened, Fragile.closed) == (2, 1)
    with pytest.raises(OSError, match="the sandbox broke"):
        interpreter.run("break")
    assert interpreter.run("x") == "x", "and is not given up"
    interpreter.close()
    interpreter.close()
    assert Fragile.opened == Fragile.closed


def test_our_own_sandboxes_are_opened_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def open_sandbox(name: str, limits: object = None, **options: object) -> Fragile:
        opened.append((name, limits, options))
        return Fragile()

    module = types.ModuleType("sandbox")
    module.__dict__.update(open_sandbox=open_sandbox, SandboxLimits=lambda *, wall_seconds: f"{wall_seconds} s")
    monkeypatch.setitem(sys.modules, "spear_lightning.sandbox", module)
    MathProblems().make()
    MathProblems(sandbox="remote", sandbox_args={"limits": {"wall_seconds": 3}, "url": "x"}).make()
    assert opened == [("auto", None, {}), ("remote", "3 s", {"url": "x"})]
    with pytest.raises(ValueError, match=r"sandbox_args: .*'seconds'"):
        MathProblems(sandbox_args={"limits": {"seconds": 3}}).make()


def test_what_programs_print_is_bounded_and_keeps_both_ends() -> None:
    class Talking(Fragile):
        def run(self, code: str) -> Ran:
            return Ran("a" * 1_000_000 + "z\n", "e" * 1_000_000)

    text = Interpreter(Talking, output_characters=100).run("")
    assert text.startswith("a" * 50 + "\n[999901 characters left out]\n" + "a" * 49 + "z\nError: eee")
    assert len(text) < 300


# --- the suite -----------------------------------------------------------------------------------------------------


def test_tasks_have_kinds_and_are_never_held_out_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    suite = MathProblems()
    suite.prepare()
    assert [len(suite.tasks(split)) for split in ("validation", "test")] == [96, 192]
    assert suite.tasks("train")[0] == Task("train-0", "chain_sum")
    questions = {split: {suite.pose(task.id)[0].question for task in suite.tasks(split)} for split in suite.sources}  # type: ignore[arg-type]
    assert not questions["train"] & (questions["validation"] | questions["test"])

    def file(name: str, *numbers: int) -> ProblemFile:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": n + 1}) + "\n" for n in numbers))
        return ProblemFile(str(path))

    mixed = MathProblems(file("train", 1, 2, 3), file("validation", 2), file("test", 3))
    with caplog.at_level(logging.INFO):
        assert [task.id for task in mixed.tasks("train")] == ["train-0"]
    assert "2 of 3 training problems are held out as well" in caplog.text
    assert mixed.pose("train-2")[0].answer == "4", "ids do not depend on what is left out"
    with pytest.raises(ValueError, match=r"train: .*test.jsonl has no problem that is not also asked"):
        MathProblems(file("test", 3), file("validation", 2), file("test", 3)).tasks("train")


def test_a_split_of_several_sources_is_one_task_type_each(tmp_path: Path) -> None:
    (tmp_path / "aime.jsonl").write_text('{"question": "?", "answer": "4"}\n')
    aime = ProblemFile(str(tmp_path / "aime.jsonl"))
    sums, others = (GeneratedProblems(["chain_sum"], count=2, seed=seed) for seed in (3_000_000, 4_000_000))
    suite = MathProblems(validation=ProblemSets({"aime": aime, "sums": sums}), test=ProblemSets({"sums": others}))
    assert [(task.id, task.task_type) for task in suite.tasks("validation")] == [
        ("validation-0", "aime"),
        ("validation-1", "sums/chain_sum"),
        ("validation-2", "sums/chain_sum"),
    ]
    assert isinstance(suite.pose("validation-0")[1], MathVerify), "not all of them have scorers of their own"
    assert type(suite.pose("test-0")[1]).__name__ == "OwnScorer"


def test_graders_follow_the_problems(tmp_path: Path) -> None:
    (tmp_path / "aime.jsonl").write_text('{"question": "?", "answer": "4"}\n')
    data = ProblemFile(str(tmp_path / "aime.jsonl"))
    suite = MathProblems(test=data)
    assert type(suite.pose("train-0")[1]).__name__ == "OwnScorer"
    assert isinstance(suite.pose("test-0")[1], MathVerify)
    strict = MathProblems(test=data, grader=StrictBox())
    assert strict.pose("train-0")[1] is strict.pose("test-0")[1] is strict.grader
    unsafe = MathProblems(train=GeneratedProblems(["simple_integration"], 3))
    with pytest.raises(ValueError, match=r"set environment.init_args.grader to MathVerify or StrictBox"):
        unsafe.prepare()


def test_bad_settings_name_the_key() -> None:
    for arguments, message in (
        ({"tool": "browser"}, r"MathProblems\.tool must be one of code_interpreter, not"),
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"output_characters": 0}, "output_characters must be at least 1"),
        ({"code_seconds": 0}, "code_seconds must be above 0"),
        ({"test": GeneratedProblems(seed=400)}, r"train \(.*seeds 0 to 479\) and test \(.*seeds 400 to 879\) overlap"),
        (
            {"test": ProblemSets({"easy": GeneratedProblems(seed=400)})},
            r"train \(.*seeds 0 to 479\) and test \(.*seeds 400 to 879\) overlap",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            MathProblems(**arguments)  # type: ignore[arg-type]
    for task in ("train", "train-480", "train--1", "dev-0", "", "train-²"):
        with pytest.raises(ValueError, match=r"there is no task"):
            MathProblems().pose(task)
    for name in ("no.such.thing", "json.nothing"):
        with pytest.raises(ValueError, match=rf"sandbox: cannot import '{name}'"):
            MathProblems(sandbox=name).make()


# --- with everything else ------------------------------------------------------------------------------------------


def test_models_play_it_in_worker_processes(suite: MathProblems) -> None:
    """A model that runs the sum of the question, on the pool, with agent and collector as in training."""
    tokenizer = chat_tokenizer("qwen2.5")
    agent = ChatToolAgent()
    agent.bind(tokenizer)

    def say(prompt: str, number: float) -> str:
        latest = prompt.rpartition("<|im_start|>user\n")[2]
        if "<tool_response>" not in prompt:
            sum_ = latest.partition("problem: ")[2].partition(" =")[0]
            return call(f"print({sum_})") + "<|im_end|>"
        result = latest.partition("<tool_response>\n")[2].partition("\n")[0]
        return f"\\boxed{{{result}}}<|im_end|>" if number < 0.6 else "I give up<|im_end|>"

    suite.prepare()
    specs = [EpisodeSpec(task, number, 0) for number, task in enumerate(suite.tasks("train"))] * 3
    specs = [EpisodeSpec(spec.task, spec.group, number) for number, spec in enumerate(specs)]
    with EnvironmentPool(pickle.loads(pickle.dumps(suite)), workers=1) as pool:
        played = Collector(pool, agent, ScriptedEngine(tokenizer, say)).play(
            specs, Sampling(500), iteration=0, seed=1, max_turns=8
        )
    assert [episode.status for episode in played.episodes] == ["finished"] * 12
    assert {episode.success for episode in played.episodes} == {True, False}
    for episode in played.episodes:
        first, last = episode.turns
        assert (first.tool_call, first.valid, last.tool_call) == (True, True, False)
        assert episode.success == (last.action is not None) == last.valid
        assert episode.score == float(episode.success)


def test_without_a_sandbox_nothing_starts(suite: MathProblems) -> None:
    suite.sandbox = "tests.sandbox.sandboxes.refuse"
    with (
        pytest.raises(EnvironmentPoolError, match=r"no sandbox works on this machine: install bubblewrap"),
        EnvironmentPool(suite, workers=1),
    ):
        pass


def test_any_message_gets_an_answer(environment: MathEnv) -> None:
    rng = random.Random(0)
    pieces = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "code_interpreter", "arguments": {"code": "',
        '"}}',
        "print(1)",
        "\\boxed{",
        "}",
        "\x00",
    ]
    for _ in range(200):
        environment.reset(options={"task": "train-1"})
        message = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 12)))
        text, _, over, _, _ = environment.step(message)
        assert over == (read_results(text) is None) == (not parse_calls(message, [CODE_INTERPRETER]))

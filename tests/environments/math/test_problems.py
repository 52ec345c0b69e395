from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from spear_lightning.environments.math import Columns, GeneratedProblems, HuggingFaceProblems, ProblemFile, ProblemSets
from spear_lightning.environments.math.generated import KINDS, SAFE_SCORERS

DAPO = {"question": "prompt", "answer": "reward_model.ground_truth", "task_type": "ability"}
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Solve it.\n\nWhat is {n} + 1?\n\nRemember."}],
        "reward_model": {"ground_truth": str(n + 1), "style": "rule"},
        "ability": "MATH",
    }
    for n in (1, 2, 1, 3)
]


def lines(path: Path, *records: object) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_both_kinds_of_file_give_the_same_problems(tmp_path: Path) -> None:
    columns = Columns(**DAPO, remove=["Solve it.", "Remember."])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "dapo.parquet")
    jsonl = ProblemFile(lines(tmp_path / "dapo.jsonl", ROWS[0], "", *ROWS[1:]), columns)
    parquet = ProblemFile(str(tmp_path / "dapo.parquet"), columns)
    assert jsonl.problems() == parquet.problems()
    assert [(p.question, p.answer, p.task_type) for p in jsonl.problems()] == [
        (f"What is {n} + 1?", str(n + 1), "MATH") for n in (1, 2, 3)
    ], "the first of equal questions"
    assert len(ProblemFile(str(tmp_path / "dapo.parquet"), columns, limit=2).problems()) == 2
    copy = pickle.loads(pickle.dumps(jsonl))
    assert len(pickle.dumps(jsonl)) < 1000
    assert copy.problems() == jsonl.problems()


def test_whole_numbers_are_answers(tmp_path: Path) -> None:
    path = lines(tmp_path / "aime.jsonl", "\ufeff" + json.dumps({"Problem": "Find x.", "Answer": 204}))
    [problem] = ProblemFile(path, Columns(question="Problem", answer="Answer")).problems()
    assert (problem.question, problem.answer, problem.task_type) == ("Find x.", "204", "")


def test_several_sources_follow_each_other_under_their_names(tmp_path: Path) -> None:
    aime = ProblemFile(lines(tmp_path / "aime.jsonl", {"question": "Find x.", "answer": 204}))
    sets = ProblemSets({"aime24": aime, "sums": GeneratedProblems(["chain_sum"], count=2)})
    assert [problem.task_type for problem in sets.problems()] == ["aime24", "sums/chain_sum", "sums/chain_sum"]
    assert sets.problems()[0].answer == "204"
    assert str(tmp_path / "aime.jsonl") in str(sets)
    size = len(pickle.dumps(ProblemSets(sets.sources)))
    assert len(pickle.dumps(sets)) == size, "a worker process reads them itself"
    assert len(sets.parts) == 2
    for wrong in ({}, {"a/b": aime}, {"": aime}):
        with pytest.raises(ValueError, match=r"ProblemSets\.sources"):
            ProblemSets(wrong)


GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "has no problem in it"),
        ([GOOD, "", "{"], r"line 3: not valid JSON"),
        ([GOOD, "[" * 100_000], r"line 2: not valid JSON"),
        ([GOOD, "[1]"], r"line 2: a list, not a JSON object"),
        (
            [GOOD, {"question": "?", "solution": "2"}],
            r"line 2: there is no column 'answer' \(wanted: answer\); there is: question, solution",
        ),
        (
            [{"question": "?", "answer": 1.5}],
            r"line 1: the answer \(answer\) is float, neither text nor a whole number",
        ),
        ([{"question": "?", "answer": True}], r"the answer \(answer\) is bool"),
        ([{"question": "?", "answer": None}], r"the answer \(answer\) is NoneType"),
        ([{"question": "?", "answer": ["2"]}], r"the answer \(answer\) is list"),
        ([{"question": "?", "answer": " "}], r"the answer \(answer\) is empty"),
        ([{"question": " ", "answer": "2"}], r"line 1: question is empty"),
        ([{"question": 3, "answer": "2"}], r"question is a int, neither text nor a list of chat messages"),
        ([{"question": [{"role": "user"}], "answer": "2"}], r"must have a role and a content"),
        ([{"question": [{"role": "assistant", "content": "x"}], "answer": "2"}], r"not of 'assistant'"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, records: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ProblemFile(lines(tmp_path / "broken.jsonl", *records)).problems()
    assert "broken.jsonl" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*absent.jsonl"):
        ProblemFile(str(tmp_path / "absent.jsonl")).problems()
    with pytest.raises(ValueError, match=r"must end in .jsonl or .parquet"):
        ProblemFile("problems.csv")
    with pytest.raises(ValueError, match=r"limit must be at least 1"):
        ProblemFile("problems.jsonl", limit=0)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "2"}')
    with pytest.raises(ValueError, match=r"latin.jsonl, line 1: not valid JSON"):
        ProblemFile(str(tmp_path / "latin.jsonl")).problems()
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(ValueError, match=r"no.parquet is not a readable Parquet file"):
        ProblemFile(str(tmp_path / "no.parquet")).problems()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "dapo.parquet")
    with pytest.raises(ValueError, match=r"no column 'question'; there is: prompt, reward_model, ability"):
        ProblemFile(str(tmp_path / "dapo.parquet")).problems()
    nested = Columns(question="prompt", answer="reward_model.answer")
    with pytest.raises(ValueError, match=r"row 1: there is no column 'answer' in reward_model .*: ground_truth, style"):
        ProblemFile(str(tmp_path / "dapo.parquet"), nested).problems()
    deeper = Columns(question="prompt", answer="ability.answer")
    with pytest.raises(ValueError, match=r"no column 'answer' in ability .*there is: a str"):
        ProblemFile(str(tmp_path / "dapo.parquet"), deeper).problems()


def test_data_sets_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((name, config, split, revision))
        if name == "absent":
            raise FileNotFoundError("no such data set")
        return ROWS

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = HuggingFaceProblems("dapo", split="test", config="en", revision="1", columns=Columns(**DAPO))
    assert [problem.answer for problem in source.problems()] == ["2", "3", "4"]
    assert source.problems() is source.problems()
    assert asked == [("dapo", "en", "test", "1")]
    with pytest.raises(ValueError, match=r"the data set absent \(train\) cannot be loaded: no such data set"):
        HuggingFaceProblems("absent").problems()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install datasets, or save the data as JSONL or Parquet"):
        HuggingFaceProblems("dapo").problems()


# --- generated -----------------------------------------------------------------------------------------------------


def test_generated_problems_depend_on_the_seed_alone() -> None:
    one, again, other = (GeneratedProblems(count=28, seed=seed).problems() for seed in (0, 0, 28))
    assert [(p.question, p.answer) for p in one] == [(p.question, p.answer) for p in again]
    assert not {p.question for p in one} & {p.question for p in other}
    assert [p.task_type for p in one[: len(KINDS)]] == list(KINDS)
    for problem in one:
        assert problem.scorer is not None
        assert problem.scorer(problem.answer) == 1.0
        assert problem.scorer("no idea") < 1.0


def test_kinds_that_evaluate_answers_have_no_scorer() -> None:
    import inspect

    import reasoning_gym

    for kind in SAFE_SCORERS:
        source = inspect.getsource(reasoning_gym.factory.DATASETS[kind][0].score_answer)
        assert not {"eval", "parse_expr", "sympify"} & set(source.replace("(", " ").replace(".", " ").split()), kind
    [problem] = GeneratedProblems(kinds=["polynomial_multiplication"], count=1).problems()
    assert problem.scorer is None


def test_settings_reach_the_data_sets() -> None:
    easy = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    source = GeneratedProblems(kinds=["chain_sum"], count=2000, settings={"chain_sum": easy})
    assert 100 < len(source.problems()) <= 200, "all there are, each once"
    for arguments, message in (
        ({"kinds": ["riddles"]}, "reasoning-gym has no data set 'riddles'; it has .*chain_sum"),
        ({"settings": {"chain_sum": {"digits": 3}}}, "settings.chain_sum: reasoning-gym refuses them: .*digits"),
        ({"settings": {"chain_sum": {"min_terms": 0}}}, "settings.chain_sum: reasoning-gym refuses them"),
    ):
        with pytest.raises(ValueError, match=message):
            GeneratedProblems(**arguments).problems()  # type: ignore[arg-type]
    for arguments, message in (
        ({"kinds": []}, "kinds must name"),
        ({"kinds": ["gcd", "gcd"]}, "each once"),
        ({"count": 0}, "count must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"kinds": ["gcd"], "settings": {"lcm": {}}}, "lcm is not among the kinds gcd"),
    ):
        with pytest.raises(ValueError, match=message):
            GeneratedProblems(**arguments)  # type: ignore[arg-type]

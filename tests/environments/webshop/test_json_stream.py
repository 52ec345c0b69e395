from __future__ import annotations

import json
from pathlib import Path

import pytest

from spear_lightning.environments.webshop import json_stream
from spear_lightning.environments.webshop.json_stream import read_array, read_object

RECORDS = [{"a": 1, "text": ']},{ \\" é ' * 5, "deep": [[{"b": None}]]}, {}, {"n": -1.5e-3, "u": "😀"}]


@pytest.fixture(params=[1 << 20, 1, 7])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much is read at a time: everything fits, and nothing does."""
    monkeypatch.setattr(json_stream, "_CHUNK", request.param)
    return int(request.param)


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_reads_what_json_reads(tmp_path: Path, style: dict[str, object]) -> None:
    path = tmp_path / "f.json"
    path.write_text("\n " + json.dumps(RECORDS, **style) + "\n", encoding="utf-8")  # type: ignore[arg-type]
    assert list(read_array(path)) == list(enumerate(json.loads(path.read_text("utf-8")), start=1))
    entries = {f"key {number}": value for number, value in enumerate([*RECORDS, 17, 12345, None, "x"])}
    path.write_text(json.dumps(entries, **style), encoding="utf-8")  # type: ignore[arg-type]
    assert dict(read_object(path)) == json.loads(path.read_text("utf-8"))


def test_empty_containers(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(" [ ] ")
    assert list(read_array(path)) == []
    path.write_text("{}")
    assert list(read_object(path)) == []


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"line 2: record 2 is not valid JSON"),
        ('[{"a": 1},\n\n {"a": "tail', r"line 3: record 2 is not valid JSON \(Unterminated string"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2: ',' expected after entry 1"),
        ('[{"a": 1},', "line 1: the file is cut off before record 2"),
        ('[{"a": 1}', "line 1: the file is cut off after entry 1"),
        ("[3]", "record 1 is a JSON int, not an object"),
        ('{"a": {}}', "is no JSON array"),
        ("", "is no JSON array"),
        ('[{"a": 1}] x', "'x' follows the end"),
        ("[" * 100_000, "record 1 is nested too deeply|record 1 is not valid JSON"),
    ],
)
def test_a_broken_array_is_named_with_record_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    if len(text) > 1000 and json_stream._CHUNK < 1000:
        pytest.skip("quadratic: a window of one character over a hundred thousand")
    with pytest.raises(ValueError, match=message) as caught:
        list(read_array(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no JSON object"),
        ("{3: 4}", "entry 1 has no name"),
        ('{"a": 4, "b" 5}', "':' expected after 'b'"),
        ('{"a": nil}', "entry 'a' is not valid JSON"),
        ('{"a": 4', "cut off after entry 1"),
    ],
)
def test_a_broken_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_object(path))


def test_missing_files_and_other_encodings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*absent\.json"):
        list(read_array(tmp_path / "absent.json"))
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xe9"}]')
    with pytest.raises(ValueError, match=r"latin\.json, line 1: it is not UTF-8"):
        list(read_array(tmp_path / "latin.json"))


def test_a_broken_record_does_not_make_it_read_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", 1000)
    path = tmp_path / "broken.json"
    path.write_text('[{"a": oops}, ' + '{"b": 1}, ' * 100_000)
    reads = []
    opened = json_stream._opened

    def counted(path: Path):  # type: ignore[no-untyped-def]
        file = opened(path)
        read = file.read

        def counting(size: int) -> str:
            reads.append(size)
            return str(read(size))

        monkeypatch.setattr(file, "read", counting, raising=False)
        return file

    monkeypatch.setattr(json_stream, "_opened", counted)
    with pytest.raises(ValueError, match="record 1"):
        list(read_array(path))
    assert len(reads) == 1

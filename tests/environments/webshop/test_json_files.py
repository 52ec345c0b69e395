"""The official files are read one entry at a time."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from spear_lightning.environments.webshop.sources import read_array, read_object

RECORDS = [{"a": 1, "text": ']},{ \\" é ' * 5, "deep": [[{"b": None}]]}, {}, {"n": -1.5e-3, "u": "😀", "t": True}]


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_reads_what_json_reads(tmp_path: Path, style: dict[str, object]) -> None:
    path = tmp_path / "f.json"
    path.write_text("\n " + json.dumps(RECORDS, **style) + "\n", encoding="utf-8")  # type: ignore[arg-type]
    assert list(read_array(path)) == list(enumerate(json.loads(path.read_text("utf-8")), start=1))
    entries = {f"key {number}": value for number, value in enumerate([*RECORDS, 17, 12345, None, "x"])}
    path.write_text(json.dumps(entries, **style), encoding="utf-8")  # type: ignore[arg-type]
    assert dict(read_object(path)) == json.loads(path.read_text("utf-8"))


def test_numbers_are_those_of_json(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text('{"a": 1, "b": 1.0, "c": 1e5, "d": 0.1, "e": 12345678901, "f": -2.2250738585072014e-308}')
    found = dict(read_object(path))
    assert found == json.loads(path.read_text())
    assert [type(value) for value in found.values()] == [int, float, float, float, int, float]


def test_empty_containers(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_text(" [ ] ")
    assert list(read_array(path)) == []
    path.write_text("{}")
    assert list(read_object(path)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', "is not valid JSON, or cut off, after 1 entries"),
        ('[{"a": 1},\n\n {"a": "tail', "is not valid JSON, or cut off, after 1 entries"),
        ('[{"a": 1}\n {"a": 2}]', "is not valid JSON, or cut off, after 1 entries"),
        ('[{"a": 1},', "is not valid JSON, or cut off, after 1 entries"),
        ('[{"a": 1}', "is not valid JSON, or cut off, after 1 entries"),
        ("[3]", "is no JSON array of objects"),
        ("[{}, 3]", "record 2 is a JSON int, not an object"),
        ('{"a": {}}', "is no JSON array"),
        ("", "is no JSON array"),
        ('[{"a": 1}] x', "after 1 entries .*trailing garbage"),
        ("[" * 100_000, "is no JSON array of objects"),
    ],
)
def test_a_broken_array_is_named_with_its_entry(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_array(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no JSON object"),
        ("{3: 4}", "is not valid JSON, or cut off, after 0 entries"),
        ('{"a": 4, "b" 5}', "is not valid JSON, or cut off, after 1 entries"),
        ('{"a": nil}', "is not valid JSON, or cut off, after 0 entries"),
        ('{"a": 4, "b": {}, "c', r"is not valid JSON, or cut off, after [12] entries"),
    ],
)
def test_a_broken_object_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_object(path))
    assert str(path) in str(caught.value)


def test_missing_files_and_other_encodings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*absent\.json"):
        list(read_array(tmp_path / "absent.json"))
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xe9"}]')
    with pytest.raises(ValueError, match=r"latin\.json is not valid JSON.*UTF"):
        list(read_array(tmp_path / "latin.json"))


def test_a_file_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text("[" + ", ".join(['{"text": "' + "x" * 1000 + '"}'] * 5000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_array(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 5


def test_a_broken_record_does_not_make_it_read_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.json"
    path.write_text('[{"a": oops}, ' + '{"b": 1}, ' * 100_000)
    read, opened = 0, Path.open

    def counted(path: Path, *arguments: object):  # type: ignore[no-untyped-def]
        file = opened(path, *arguments)  # type: ignore[call-overload]

        class Counted:
            def __enter__(self) -> Counted:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def read(self, size: int = -1) -> bytes:
                nonlocal read
                content = file.read(size)
                read += len(content)
                return bytes(content)

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        return Counted()

    monkeypatch.setattr(Path, "open", counted)
    with pytest.raises(ValueError, match="is not valid JSON, or cut off, after 0 entries"):
        list(read_array(path))
    assert 0 < read < 200_000

"""Prompts of files: lines, texts and messages; and what is none, by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from maxi.data.prompts import read
from maxi.errors import DataError

USER = {"role": "user", "content": "hello"}
SYSTEM = {"role": "system", "content": "be short"}
ASSISTANT = {"role": "assistant", "content": "hi"}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_lines_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes("\ufeffone\r\n\n  \n  naïve, two \nthree".encode())
    assert list(read(str(path))) == [(f"{path}:1", "one"), (f"{path}:4", "  naïve, two "), (f"{path}:5", "three")]


def test_records(tmp_path: Path) -> None:
    """The answers that rows to train on end in are left out, those in between are not."""
    asked = [[SYSTEM, USER], [USER, ASSISTANT, USER], [USER]]
    records = [{"prompt": "one", "id": 3}, *({"messages": messages} for messages in asked[:2])]
    records += [{"prompt": [USER], "completion": [ASSISTANT]}, {"messages": [USER, ASSISTANT, ASSISTANT]}]
    path = write(tmp_path / "rows.jsonl", *records)
    found = list(read(path))
    assert [prompt for _, prompt in found] == ["one", *asked, [USER]]
    assert [where for where, _ in found] == [f"{path}:{line}" for line in range(1, 6)]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1], "the record is no object"),
        ({"text": "x"}, "there is no prompt, only text"),
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": 7}, "there is no prompt"),
        ({"messages": []}, "there is no prompt"),
        ({"messages": ["hello"]}, "message 1 has no role"),
        ({"messages": [USER, {"content": "x"}]}, "message 2 has no role"),
        ({"messages": [ASSISTANT]}, "nobody but the assistant"),
    ],
)
def test_what_is_no_prompt(record: Any, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "fine"}, record)
    with pytest.raises(DataError, match=words) as caught:
        list(read(path))
    assert f"({path}:2)" in str(caught.value)


def test_files_without_prompts(tmp_path: Path) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("\n \n")
        with pytest.raises(DataError, match="the file has no prompt"):
            list(read(str(tmp_path / name)))
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(DataError, match=name):
            list(read(str(tmp_path / name)))

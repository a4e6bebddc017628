"""What a few bytes may come to: lists and records of JSON, rows of parquet, and lines, each within bounds of memory."""

import gzip
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maxi.data import documents, json_text, parquet, streams
from maxi.data.documents import Budget
from maxi.errors import DataError
from maxi.sections import Source


def read(path: Path) -> list[Any]:
    return [document.text for document in documents.read(Source(path=str(path)), Budget())]


def pieces(raw: bytes, size: int) -> list[bytes]:
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def random_value(pick: random.Random, depth: int = 0) -> Any:
    kind = pick.random()
    if depth < 3 and kind < 0.3:
        return [random_value(pick, depth + 1) for _ in range(pick.randrange(4))]
    if depth < 3 and kind < 0.6:
        return {str(pick.random())[: pick.randrange(6)]: random_value(pick, depth + 1) for _ in range(pick.randrange(4))}
    return pick.choice([1, -2.5e10, 10, 'é\n"\\😀', None, True, 12345678901234567890, "", "x" * 50])


def test_a_list_in_pieces_is_what_json_makes_of_it() -> None:
    """Also when it is damaged: refused at the same line and column, or not at all."""
    pick = random.Random(0)
    for _ in range(1500):
        value = [random_value(pick) for _ in range(pick.randrange(5))]
        raw = json.dumps(value, indent=pick.choice([None, 1]), ensure_ascii=pick.random() < 0.5).encode()
        size = pick.choice([1, 2, 3, 7, 1000])
        assert list(json_text.elements(pieces(raw, size), Path("a"))) == value
        damaged = bytearray(raw)
        damaged[pick.randrange(1, len(raw))] = pick.choice(b'{}[]",:0a\n\\')
        try:
            expected = json.loads(bytes(damaged))
        except json.JSONDecodeError as error:
            with pytest.raises(DataError, match=rf"malformed JSON, .*\(a:{error.lineno}:{error.colno}\)"):
                list(json_text.elements(pieces(bytes(damaged), size), Path("a")))
        except UnicodeDecodeError:
            with pytest.raises(DataError, match=r"not UTF-8 \(a, byte \d+\)"):
                list(json_text.elements(pieces(bytes(damaged), size), Path("a")))
        else:
            assert list(json_text.elements(pieces(bytes(damaged), size), Path("a"))) == expected


def test_a_list_is_never_held_whole(tmp_path: Path) -> None:
    row = json.dumps({"text": "x" * 100_000}) + ",\n"
    (tmp_path / "a.json").write_text(f"[{row * 600}{{}}]".replace(",\n{}]", "]"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in documents.read(Source(path=str(tmp_path / "a.json")), Budget())) == 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10  # of 60 MB


@pytest.mark.parametrize("raw", [b"[],", b"{},", b"1.5,", b'"ab",', b"[[[["])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_of_too_many_values(raw: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MOST_VALUES", 100_000)
    whole = b'{"text": [' + raw * 600_000 + b"0]}"
    (tmp_path / name).write_bytes(whole if name == "a.jsonl" else b"[" + whole + b"]")
    with pytest.raises(DataError, match=rf"(the record holds over 100,000 values|nested too deeply) .*{name}:1\)"):
        read(tmp_path / name)


def test_signs_inside_of_a_text_are_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MOST_VALUES", 100)
    text = 'a,b[c{"\\' * 200_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert read(tmp_path / "a.jsonl") == [text]


def test_a_record_of_a_list_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 3_000_000)
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "' + "x" * 9_000_000)
    with pytest.raises(DataError, match=r"a record is over 3 MB .*a.json:1\)"):
        read(tmp_path / "a.json")


def test_a_long_line_takes_time_in_proportion(tmp_path: Path) -> None:
    """Its pieces are joined once: a line of 60 MB would take ten seconds if they were joined one by one."""
    (tmp_path / "a.txt").write_bytes(b"x" * 60_000_000)
    assert [len(line) for _, line in streams.lines(tmp_path / "a.txt")] == [60_000_000]


def test_blank_lines_by_the_million_cost_nothing(tmp_path: Path) -> None:
    """And are counted all the same."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" * 50_000_000 + b'{"text": "a"}\n\n{"text": 4}', 1))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"is a number, not text .*a.jsonl.gz:50000003\)"):
        read(tmp_path / "a.jsonl.gz")
    assert time.monotonic() - began < 2


def repeated(text: str, rows: int) -> pa.Table:
    """A text that is stored once."""
    return pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))})


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def test_parquet_that_repeats_a_text_like_a_bomb(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", repeated("the sea " * 40_000, 10_000))
    assert path.stat().st_size < 50_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"expands more than 1000 times .*a.parquet, after row \d+\)"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


@pytest.mark.parametrize(("free", "says"), [(1_000_000, "expands more than 1000 times"), (10**9, "over 2 MB a row")])
def test_parquet_of_zeros(free: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by what the file says of itself, before a page is decoded."""
    monkeypatch.setattr(streams, "MAX_FREE_BYTES", free)
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 2_000_000)
    path = write(tmp_path / "a.parquet", pa.table({"text": ["a" * 20_000_000]}), compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=says):
        read(path)


def test_parquet_of_a_row_of_nothing_a_million_times(tmp_path: Path) -> None:
    table = pa.table({"messages": pa.array([[None] * 3_000_000], pa.list_(pa.string()))})
    path = write(tmp_path / "a.parquet", table, compression="zstd")
    with pytest.raises(DataError, match=r"'messages.list.element' holds over 2,000,000 values a row .*row group 1"):
        list(documents.records(Source(path=str(path)), lambda row, _: row, Budget()))


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert read(path) == []


def test_parquet_that_is_nested_deep(tmp_path: Path) -> None:
    column = pa.array(["x"])
    for _ in range(60):
        column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), column)
    with pytest.raises(DataError, match="too deeply nested"):
        read(write(tmp_path / "a.parquet", pa.table({"text": column})))


def test_texts_that_repeat_honestly_are_read(tmp_path: Path) -> None:
    """Fewer rows at once, the same rows."""
    path = write(tmp_path / "a.parquet", repeated("the sea " * 100_000, 40))
    with pq.ParquetFile(path) as file:
        assert parquet._rows_at_once(file.metadata, ["text"], "a") < 400
    assert read(path) == ["the sea " * 100_000] * 40

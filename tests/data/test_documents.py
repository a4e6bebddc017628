"""Every kind of source, and every fault of a data file: the class of the error, and the file and line it names."""

import gzip
import itertools
import json
import zlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from maxi.data import documents, formats, hub, python_docs, streams
from maxi.data.documents import Budget
from maxi.errors import DataError, EnvironmentFault
from maxi.sections import Source

TEXTS = ["one\nline", "zwei Zeilen 🎉", "三"]


def texts(path: Path | str, budget: Budget | None = None, field: str = "text") -> list[str]:
    return [found.text for found in documents.read(Source(path=str(path), field=field), budget or Budget())]


def jsonl(rows: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()


def parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_json_sources(tmp_path: Path, suffix: str, packed: str) -> None:
    raw = json.dumps([{"text": text} for text in TEXTS], indent=1).encode() if suffix == ".json" else jsonl(TEXTS)
    path = tmp_path / f"a{suffix}{packed}"
    path.write_bytes(PACK[packed](raw))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("packed", PACK)
def test_txt_source(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"a.txt{packed}"
    path.write_bytes(PACK[packed](b"\xef\xbb\xbfone\r\ntwo\rthree\n<|endoftext|>\nfour \0 <|endoftext|>\n"))
    found = list(documents.read(Source(path=str(path)), Budget()))
    assert [(d.text, d.where) for d in found] == [("one\ntwo\nthree", f"{path}:1"), ("four \0 <|endoftext|>", f"{path}:4")]


def test_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(jsonl(TEXTS))
    assert texts(tmp_path / "a.json") == TEXTS


def test_long_txt_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"line {i} " + "x" * 50 if i % 9 != 8 else "" for i in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = list(documents.read(Source(path=str(tmp_path / "a.txt")), Budget()))
    assert len(found) > 3 and all(len(d.text) <= formats.TEXT_PIECE for d in found)
    assert "\n".join(d.text for d in found) == "\n".join(lines)
    for piece in found:  # each begins at the line that its `where` names
        assert lines[int(piece.where.rsplit(":", 1)[1]) - 1] == piece.text.split("\n")[0] != ""


def test_parquet_source(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", other=[1, 2, 3], body=TEXTS)
    found = list(documents.read(Source(path=str(path), field="body"), Budget()))
    assert [d.text for d in found] == TEXTS and found[2].where == f"{path}, row 3"


ROWS = [{"id": i, "talk": [{"who": "a", "says": text}]} for i, text in enumerate(TEXTS)]


def rows(path: Path | str, budget: Budget | None = None) -> list[tuple[dict, str]]:
    """(record, where) of every record."""
    return list(documents.records(Source(path=str(path)), lambda record, where: (record, where), budget or Budget()))


def test_records_have_all_fields_in_every_format(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(PACK[".zst"](lines))
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1))
    parquet(tmp_path / "c.parquet", **{name: [row[name] for row in ROWS] for name in ROWS[0]}, at=[datetime(2020, 1, 1)] * 3)
    found = rows(tmp_path)
    assert [record for record, _ in found] == ROWS * 3
    ends = [where.removeprefix(str(tmp_path)) for _, where in found]
    assert ends[0::3] == ["/a.jsonl.zst:1", "/b.json, record 1", "/c.parquet, row 1"] and ends[8] == "/c.parquet, row 3"
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert rows(tmp_path / "saved") == [(row, f"{tmp_path}/saved, row {i}") for i, row in enumerate(ROWS, 1)]


def test_records_that_are_refused_go_to_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": }\n{"n": 2}\n')

    def odd(record: dict, where: str) -> int:
        if record["n"] % 2 == 0:
            raise DataError("even", where)
        return record["n"]

    budget = Budget(2)
    assert list(documents.records(Source(path=str(path)), odd, budget)) == [1] and budget.skipped == 2
    with pytest.raises(DataError, match=r"malformed JSON.*\(.*a.jsonl:2:7\)"):
        list(documents.records(Source(path=str(path)), odd, Budget()))
    with pytest.raises(DataError, match=r"even \(after 1 skipped records\) \(.*a.jsonl:3\)"):
        list(documents.records(Source(path=str(path)), odd, Budget(1)))


def test_txt_holds_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"text, not records \(.*a.txt\)"):
        rows(tmp_path, Budget(9))


def test_text_is_read_from_its_column_alone(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=TEXTS, raw=pa.array([b"\xff"] * 3).view(pa.string()))
    assert texts(path) == TEXTS
    with pytest.raises(DataError, match=r"a column is not UTF-8 .*a.parquet, rows 1 to"):
        rows(path)


def test_folders_and_globs_are_sorted_and_deep(tmp_path: Path) -> None:
    for name in ("b/z.jsonl", "b/a.jsonl.gz", "a.txt", "notes.md", "b/.hidden.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            gzip.compress(jsonl(["gz"])) if name.endswith("gz") else b"plain" if "txt" in name else jsonl(["line"])
        )
    assert [f.name for f in documents.files(Source(path=str(tmp_path)))] == ["a.txt", "a.jsonl.gz", "z.jsonl"]
    assert texts(tmp_path) == ["plain", "gz", "line"]
    assert texts(f"{tmp_path}/**/*.jsonl") == ["line"]
    assert texts(f"{tmp_path}/b*") == ["gz", "line"]


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"a": saved, "b": saved}).save_to_disk(tmp_path / "none")
    assert texts(tmp_path / "one") == texts(tmp_path / "two") == TEXTS
    assert texts(tmp_path / "two" / "test") == TEXTS[:1]
    with pytest.raises(DataError, match="the splits a, b"):
        texts(tmp_path / "none")
    with pytest.raises(DataError, match="no field 'txt', only text, n"):
        texts(tmp_path / "one", field="txt")


def test_hub_names() -> None:
    assert hub.parse("hf://a/b") == ("a/b", None, "train")
    assert hub.parse("hf://a/b:en@validation") == ("a/b", "en", "validation")
    with pytest.raises(DataError, match="no name"):
        hub.parse("hf://")


def test_missing_datasets_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EnvironmentFault, match=r"hf://a/b.*pip install \"maxi\[datasets\]\""):
        texts("hf://a/b")


BAD_LINES = {
    "malformed": ('{"text": "a",, }', r":2:14\)", "malformed JSON"),
    "missing": ('{"txt": "a", "id": 1}', r":2\): set field: txt", "no field 'text', only txt, id"),
    "null": ('{"text": null}', r":2\)", "is null, not text"),
    "number": ('{"text": 3}', r":2\)", "is a number, not text"),
    "empty": ('{"text": " "}', r":2\)", "is empty"),
    "not an object": ("[1]", r":2\)", "is a list, not an object"),
    "surrogate": (r'{"text": "ab\ud800"}', r":2\)", r"lone surrogate U\+D800 at character 2"),
    "nesting bomb": ("[" * 200_000, r":2\)", "nested too deeply"),
    "huge number": ('{"text": ' + "1" * 5000 + "}", r":2\)", "malformed JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named_or_forgiven(tmp_path: Path, name: str) -> None:
    line, where, what = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n' + line + '\n\n{"text": "last"}\n')
    with pytest.raises(DataError, match=f"error\\[3\\] .*{what}.*a.jsonl{where}"):
        texts(path)
    budget = Budget(1)
    assert texts(path, budget) == ["first", "last"] and budget.skipped == 1


def test_budget_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(DataError, match=r"after 2 skipped records.*a.jsonl:3"):
        texts(tmp_path / "a.jsonl", Budget(2))


def test_bad_utf8_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(DataError, match=r"0xff is not UTF-8 .*a.txt:2:5"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe4"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1:11"):
        texts(tmp_path / "a.jsonl")


def test_bad_json_list_names_line_column_and_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n{"text": }]')
    with pytest.raises(DataError, match=r"a.json:3:10"):
        texts(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": null}]')
    with pytest.raises(DataError, match=r"a.json, record 2"):
        texts(tmp_path / "a.json")


def test_bad_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["a", None, "c"], n=[1, 2, 3])
    with pytest.raises(DataError, match=r"is null.*a.parquet, row 2"):
        texts(path)
    assert texts(path, Budget(1)) == ["a", "c"]
    with pytest.raises(DataError, match=r"no field 'txt', only text, n .*set field: text"):
        texts(path, field="txt")
    with pytest.raises(DataError, match="'n' holds int64, not text"):
        texts(path, field="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"truncated or damaged.*a.parquet"):
        texts(path)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_truncated_and_damaged_archives(tmp_path: Path, packed: str) -> None:
    raw = PACK[packed](jsonl([str(i) for i in range(5000)]))
    path = tmp_path / f"a.jsonl{packed}"
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(DataError, match=f"truncated .*a.jsonl{packed}, offset {cut}"):
            texts(path)
    path.write_bytes(raw[: len(raw) // 2] + b"\xff\x00\xff" * 9 + raw[len(raw) // 2 + 27 :])
    with pytest.raises(DataError, match=rf"(damaged|truncated|malformed JSON|not UTF-8).*a.jsonl{packed}"):
        texts(path)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_concatenated_archives_are_one(tmp_path: Path, packed: str) -> None:
    padding = b"\0" * 300 if packed == ".gz" else b""
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACK[packed](jsonl(TEXTS[:1])) + PACK[packed](jsonl(TEXTS[1:])) + padding)
    assert texts(tmp_path / f"a.jsonl{packed}") == TEXTS


def test_large_gzip_is_read_whole(tmp_path: Path) -> None:
    raw = b"".join(b"%09d\n" % i for i in range(300_000)) + b"\n" * 3_000_000
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw, 9))
    assert b"".join(streams.pieces(tmp_path / "a.gz")) == raw


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_bombs_are_refused(tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_FREE_BYTES", 4_000_000)
    raw = bytes(30_000_000)
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(zlib.compress(raw, 9, 31) if packed == ".gz" else PACK[packed](raw))
    monkeypatch.setattr(streams, "MAX_RATIO", 500)
    with pytest.raises(DataError, match=f"like a bomb .*a.jsonl{packed}, offset"):
        texts(path)


def test_long_lines_are_refused_while_they_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 3_000_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]) + b"x" * 5_000_000)
    with pytest.raises(DataError, match=r"a line is over 3 MB .*a.jsonl:2"):
        texts(tmp_path / "a.jsonl")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*none"):
        texts(tmp_path / "none*.txt")
    with pytest.raises(DataError, match="no file matches"):
        texts(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="the folder has no file that is read"):
        texts(tmp_path)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"files ending in .csv are not read"):
        texts(tmp_path / "a.csv")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"the file has no text .*empty.txt"):
        texts(tmp_path / "empty.txt")


def test_python_docs_are_many_and_always_the_same() -> None:
    first = list(python_docs.documents())
    assert sum(len(d.text) for d in first) > 1_500_000 and len(first) > 300
    assert [d.where for d in first] == [d.where for d in python_docs.documents()]
    by_name = {d.where: d.text for d in first}
    assert len(by_name) == len(first)
    assert "class ArgumentParser(_AttributeHolder, _ActionsContainer)" in by_name["python-docs:module argparse"]
    assert not any(".test." in name or "site-packages" in name for name in by_name)
    for d in first:
        d.text.encode()


def test_python_docs_ask_and_answer() -> None:
    first = list(itertools.islice(documents.records(Source(path="python-docs"), lambda row, _: row, Budget()), 100))
    pairs = list(documents.records(Source(path="python-docs-preferences"), lambda row, _: row, Budget()))
    assert [(row["question"], row["answer"]) for row in first] == [(row["prompt"], row["chosen"]) for row in pairs[:100]]
    assert len(pairs) > 3000 and len({row["prompt"] for row in pairs}) == len(pairs)
    chosen, rejected = ({row[name] for row in pairs} for name in ("chosen", "rejected"))
    assert chosen == rejected and len(chosen) == len(pairs) and not any(row["chosen"] == row["rejected"] for row in pairs)
    assert all(20 <= len(answer) <= 400 for answer in chosen)
    asked = {row["chosen"]: row["prompt"] for row in pairs}
    assert "`textwrap.dedent`" in asked["Remove any common leading whitespace from every line in `text`."]
    assert not any(documents.files(Source(path=path)) for path in documents.EMBEDDED)
    assert documents.EMBEDDED == ("python-docs", "python-docs-preferences")

"""Files to documents, one reader a format; each streams, and names the file and the line in its errors.

A bad record goes to the budget; a file that breaks off or cannot be decoded at all is an error at once, because what
is missing of it cannot be counted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maxi.data import streams
from maxi.data.records import Budget, Document, document, document_of, missing
from maxi.errors import DataError

MAX_JSON_BYTES = 1_000_000_000
TEXT_PIECE = 1 << 16
"""A .txt file is cut into documents of at most about this many characters."""

SEPARATOR = "<|endoftext|>"

Reader = Callable[[Path, str, Budget], Iterator[Document]]


def read_txt(path: Path, _field: str, budget: Budget) -> Iterator[Document]:
    """A plain text. Lines that are exactly `<|endoftext|>` separate documents; a longer stretch than TEXT_PIECE is cut at
    the last blank line before that (without one, at a line end), which bounds the memory and gives a held-out share
    something to choose from. CRLF and CR become LF; a byte-order mark and the last line end are dropped.
    """
    held: list[str] = []
    first, size, found = 1, 0, False
    for number, raw in streams.lines(path):
        line = streams.decode(raw, f"{path}:{number}").removesuffix("\r").replace("\r", "\n")
        ends = line == SEPARATOR
        if ends or (held and size + len(line) > TEXT_PIECE):
            blank = 0 if ends else next((i + 1 for i in reversed(range(len(held))) if not held[i].strip()), 0)
            cut = blank or len(held)
            text, held = "\n".join(held[:cut]), held[cut:]
            if text.strip():
                found = True
                yield Document(text, f"{path}:{first}")
            first, size = number + ends - len(held), sum(len(line) + 1 for line in held)
        if not ends:
            held.append(line)
            size += len(line) + 1
    if "".join(held).strip():
        yield Document("\n".join(held), f"{path}:{first}")
    elif not found:
        budget.forgive(DataError("the file has no text", str(path), "remove it, or allow for it with data.skip_bad"))


def read_jsonl(path: Path, field: str, budget: Budget) -> Iterator[Document]:
    """One JSON object a line; blank lines are passed over."""
    for number, raw in streams.lines(path):
        if not raw.strip():
            continue
        try:
            found = document_of(_parse(raw, str(path), number), field, f"{path}:{number}")
        except DataError as error:
            budget.forgive(error)
            continue
        yield found


def read_json(path: Path, field: str, budget: Budget) -> Iterator[Document]:
    """A list of objects, read whole (so at most MAX_JSON_BYTES); or one object a line, as many `.json` files are."""
    held, size = [], 0
    for piece in streams.pieces(path):
        if not held and not piece.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from read_jsonl(path, field, budget)
            return
        held.append(piece)
        size += len(piece)
        if size > MAX_JSON_BYTES:
            raise DataError("the JSON list is over 1 GB", str(path), "write one object a line into a .jsonl file")
    raw = b"".join(held).removeprefix(b"\xef\xbb\xbf")
    records = _parse(raw, str(path), 1) if held else []
    for number, record in enumerate(records, 1):
        try:
            found = document_of(record, field, f"{path}, record {number}")
        except DataError as error:
            budget.forgive(error)
            continue
        yield found


def read_parquet(path: Path, field: str, budget: Budget) -> Iterator[Document]:
    """A column of text, streamed a few rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise missing(field, schema.names, str(path))
            kind: Any = schema.field(field).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
                raise DataError(f"the column {field!r} holds {kind}, not text", str(path), "name a column of text with field:")
            for batch in file.iter_batches(256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    try:
                        found = document(text, field, f"{path}, row {number}")
                    except DataError as error:
                        budget.forgive(error)
                        continue
                    yield found
    except UnicodeDecodeError:
        where = f"{path}, rows {number + 1} to {number + 256}"
        raise DataError(f"the column {field!r} is not UTF-8", where, "write it again as UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        what = f"the parquet file is truncated or damaged, {str(error)[:200]}"
        raise DataError(what, f"{path}, after row {number}", "copy or download it again") from None


READERS: dict[str, Reader] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
}


def reader(path: Path) -> Reader | None:
    """The reader for a file by its suffix (case does not matter), or None for a file that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in streams.COMPRESSIONS:
        return READERS.get(suffixes[0]) if len(suffixes) == 2 and suffixes[0] != ".parquet" else None
    return READERS.get(suffixes[-1]) if suffixes else None


def _parse(raw: bytes, path: str, line: int) -> Any:
    """JSON; `line` is the number of the first line of `raw`."""
    text = streams.decode(raw, f"{path}:{line}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise DataError(f"malformed JSON, {error.msg}", where, "mend it, or allow for it with data.skip_bad") from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply", f"{path}:{line}", "remove the record") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(
            f"malformed JSON, {str(error)[:80]}", f"{path}:{line}", "mend it, or allow for it with data.skip_bad"
        ) from None

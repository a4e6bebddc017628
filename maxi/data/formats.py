"""Files to records, one reader a format; each streams, and names the file and the line in its errors.

What becomes of a record (a document, a conversation) is for `make` to say, which the caller hands in. A bad record goes
to the budget; a file that breaks off or cannot be decoded at all is an error at once, because what is missing of it
cannot be counted.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from maxi.data import streams
from maxi.data.records import Budget, Make, T, made, missing
from maxi.errors import DataError

MAX_JSON_BYTES = 1_000_000_000
TEXT_PIECE = 1 << 16
"""A .txt file is cut into documents of at most about this many characters."""

SEPARATOR = "<|endoftext|>"


class Reader(Protocol):
    """What a format is: every record of a file through `make`, those that it refuses to the budget.

    only: the one field, of text, that `make` looks at, so that the rest need not be read; None: it looks at all.
    """

    def __call__(self, path: Path, make: Make[T], budget: Budget, only: str | None, /) -> Iterator[T]: ...


def read_txt(path: Path, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    """A plain text, each of its documents as a record whose one field is `only`."""
    if only is None:
        raise DataError("a .txt file holds text, not records", str(path), "write one JSON object a line into a .jsonl file")
    found = False
    for thing in made((({only: text}, where) for text, where in _texts(path)), make, budget):
        found = True
        yield thing
    if not found:
        budget.forgive(DataError("the file has no text", str(path), "remove it, or allow for it with data.skip_bad"))


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(document, where). Lines that are exactly `<|endoftext|>` separate documents; a longer stretch than TEXT_PIECE is cut at
    the last blank line before that (without one, at a line end), which bounds the memory and gives a held-out share
    something to choose from. CRLF and CR become LF; a byte-order mark and the last line end are dropped.
    """
    held: list[str] = []
    first, size, name = 1, 0, str(path)
    for number, raw in streams.lines(path):
        line = streams.decode(raw, f"{name}:{number}").removesuffix("\r").replace("\r", "\n")
        ends = line == SEPARATOR
        if ends or (held and size + len(line) > TEXT_PIECE):
            blank = 0 if ends else next((i + 1 for i in reversed(range(len(held))) if not held[i].strip()), 0)
            cut = blank or len(held)
            text, held = "\n".join(held[:cut]), held[cut:]
            if text.strip():
                yield text, f"{name}:{first}"
            first, size = number + ends - len(held), sum(len(line) + 1 for line in held)
        if not ends:
            held.append(line)
            size += len(line) + 1
    if "".join(held).strip():
        yield "\n".join(held), f"{name}:{first}"


def read_jsonl(path: Path, make: Make[T], budget: Budget, _only: str | None) -> Iterator[T]:
    """One JSON object a line; blank lines are passed over."""
    name = str(path)
    lines = ((raw, f"{name}:{number}") for number, raw in streams.lines(path) if raw.strip())
    return made(lines, lambda raw, where: make(_parse(raw, where), where), budget)


def read_json(path: Path, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    """A list of objects, read whole (so at most MAX_JSON_BYTES); or one object a line, as many `.json` files are."""
    held, size = [], 0
    for piece in streams.pieces(path):
        if not held and not piece.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from read_jsonl(path, make, budget, only)
            return
        held.append(piece)
        size += len(piece)
        if size > MAX_JSON_BYTES:
            raise DataError("the JSON list is over 1 GB", str(path), "write one object a line into a .jsonl file")
    raw = b"".join(held).removeprefix(b"\xef\xbb\xbf")
    records = _parse(raw, f"{path}:1") if held else []
    yield from made(((record, f"{path}, record {number}") for number, record in enumerate(records, 1)), make, budget)


def read_parquet(path: Path, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    """Rows, streamed a few at a time, without columns of times; with `only`, that column alone, refused at once when it is
    not text."""
    return made(_rows(path, only), make, budget)


def _rows(path: Path, only: str | None) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, name = 0, str(path)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(256, columns=_columns(file.schema_arrow, only, name)):
                rows = batch.to_pylist() if only is None else ({only: text} for text in batch.column(0).to_pylist())
                for row in rows:
                    number += 1
                    yield row, f"{name}, row {number}"
    except DataError:
        raise
    except UnicodeDecodeError:
        column, where = "a column" if only is None else f"the column {only!r}", f"{name}, rows {number + 1} to {number + 256}"
        raise DataError(f"{column} is not UTF-8", where, "write it again as UTF-8") from None
    except (pa.ArrowException, OSError) as error:
        what = f"the parquet file is truncated or damaged, {str(error)[:200]}"
        raise DataError(what, f"{name}, after row {number}", "copy or download it again") from None
    except (ValueError, OverflowError) as error:
        what = f"a value cannot be read, {str(error)[:200]}"
        raise DataError(what, f"{name}, after row {number}", "drop its column") from None


def _columns(schema: Any, only: str | None, where: str) -> list[str]:
    """`only`, which must be text; or all but times, which say nothing to a model and do not all fit into Python's."""
    from pyarrow import types

    if only is None:
        return [field.name for field in schema if not types.is_temporal(field.type)]
    if only not in schema.names:
        raise missing(only, schema.names, where)
    kind = schema.field(only).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view)):
        raise DataError(f"the column {only!r} holds {kind}, not text", where, "name a column of text with field:")
    return [only]


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


def _parse(raw: bytes, where: str) -> Any:
    """JSON; `where` is the file and the first line of `raw`, as in `a.json:1`."""
    text = streams.decode(raw, where)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        path, _, line = where.rpartition(":")
        what, where = f"malformed JSON, {error.msg}", f"{path}:{int(line) + error.lineno - 1}:{error.colno}"
        raise DataError(what, where, "mend it, or allow for it with data.skip_bad") from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply", where, "remove the record") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"malformed JSON, {str(error)[:80]}", where, "mend it, or allow for it with data.skip_bad") from None

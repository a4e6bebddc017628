"""Files to records, one reader a format; each streams, and names the file and the line in its errors.

What becomes of a record (a document, a conversation) is for `make` to say, which the caller hands in. A bad record goes
to the budget; a file that breaks off or cannot be decoded at all is an error at once, because what is missing of it
cannot be counted.
"""

import codecs
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

from maxi.data import json_text, parquet, streams
from maxi.data.records import Budget, Make, T, made
from maxi.errors import DataError

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
    lines = (((raw, number), f"{name}:{number}") for number, raw in streams.lines(path, blank=False) if raw.strip())
    return made(lines, lambda line, where: make(json_text.parse(streams.decode(line[0], where), name, line[1]), where), budget)


def read_json(path: Path, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    """A list of objects; or one object a line, as many `.json` files are."""
    pieces = streams.pieces(path)
    first = next((piece for piece in pieces if piece.removeprefix(codecs.BOM_UTF8).strip()), b"")
    if not first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return read_jsonl(path, make, budget, only)
    records = json_text.elements(chain([first], pieces), path)
    return made(((record, f"{path}, record {number}") for number, record in enumerate(records, 1)), make, budget)


def read_parquet(path: Path, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    """Rows, streamed a few at a time, without columns of times; with `only`, that column alone, refused at once when it is
    not text."""
    return made(parquet.rows(path, only), make, budget)


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

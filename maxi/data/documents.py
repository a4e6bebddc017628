"""Sources to documents, or to records: which files a source means, and what is in them, in an order that never changes."""

import glob
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from maxi.data import formats, hub, python_docs
from maxi.data.records import Budget, Document, Make, T, document_of, made
from maxi.errors import DataError
from maxi.sections import Source

PYTHON_DOCS = "python-docs"
_EMBEDDED = {PYTHON_DOCS: python_docs.questions, f"{PYTHON_DOCS}-preferences": python_docs.preferences}

EMBEDDED = tuple(_EMBEDDED)
"""The sources that no file is behind; what they hold depends on the version of Python alone."""

__all__ = ["EMBEDDED", "PYTHON_DOCS", "Budget", "Document", "files", "read", "records"]


def files(source: Source) -> list[Path]:
    """The files of a source, sorted by path; none for those in EMBEDDED.

    A folder means every file in it, at any depth, whose suffix is known and whose name does not begin with a dot; a
    glob (`**` too) means what it matches, and folders that it matches count as folders. Raises DataError when there
    is nothing, or when a file that was named has a suffix that is not read.
    """
    path = source.path
    if path in EMBEDDED:
        return []
    if path.startswith(hub.PREFIX):
        return hub.files(path)
    here = Path(path).expanduser()
    if here.is_dir() and hub.is_saved_dataset(here):
        return sorted(file for file in here.rglob("*") if file.is_file())
    if here.is_file():
        if formats.reader(here) is None:
            raise DataError(
                f"files ending in {here.suffix or 'nothing'} are not read", path, f"use {', '.join(formats.READERS)}"
            )
        return [here]
    matched = [here] if here.is_dir() else [Path(match) for match in glob.glob(str(here), recursive=True)]  # noqa: PTH207 (takes absolute patterns)
    found = {file for match in matched for file in (match.rglob("*") if match.is_dir() else [match])}
    found = sorted(file for file in found if not file.name.startswith(".") and formats.reader(file) and file.is_file())
    if not found:
        what = "the folder has no file that is read" if here.is_dir() else "no file matches"
        raise DataError(what, path, f"check the path (relative to {Path.cwd()}); read are {', '.join(formats.READERS)}")
    return found


def read(source: Source, skip_bad: Budget) -> Iterator[Document]:
    """The documents of a source, file after file, record after record, up to its `limit`.

    Raises DataError (file, line, fix) for what cannot be read; up to `skip_bad.allowed` bad records are passed over
    and counted instead.
    """
    if source.path == PYTHON_DOCS:
        return islice(python_docs.documents(), source.limit)
    return islice(_each(source, partial(document_of, source.field), skip_bad, source.field), source.limit)


def records(source: Source, make: Make[T], budget: Budget) -> Iterator[T]:
    """Every record of a source, all its fields, through `make(record, where)`, file after file, up to its `limit`.

    `source.field` means nothing here. Raises DataError for what cannot be read and for .txt files, which hold no
    records; a record that is malformed or that `make` refuses goes to the budget.
    """
    return islice(_each(source, make, budget, None), source.limit)


def _each(source: Source, make: Make[T], budget: Budget, only: str | None) -> Iterator[T]:
    here = Path(source.path).expanduser()
    if source.path in EMBEDDED:
        yield from made(_EMBEDDED[source.path](), make, budget)
    elif source.path.startswith(hub.PREFIX):
        yield from hub.read(source.path, make, budget, only)
    elif here.is_dir() and hub.is_saved_dataset(here):
        yield from hub.read(str(here), make, budget, only)
    else:
        for file in files(source):
            reader = formats.reader(file)
            assert reader is not None  # files() lists no others
            yield from reader(file, make, budget, only)

"""Sources to documents: which files a source means, and the texts in them, in an order that never changes."""

import glob
from collections.abc import Iterator
from pathlib import Path

from maxi.config import Source
from maxi.data import formats, hub, python_docs
from maxi.data.records import Budget, Document
from maxi.errors import DataError

PYTHON_DOCS = "python-docs"

__all__ = ["PYTHON_DOCS", "Budget", "Document", "files", "read"]


def files(source: Source) -> list[Path]:
    """The files of a source, sorted by path; none for `python-docs`.

    A folder means every file in it, at any depth, whose suffix is known and whose name does not begin with a dot; a
    glob (`**` too) means what it matches, and folders that it matches count as folders. Raises DataError when there
    is nothing, or when a file that was named has a suffix that is not read.
    """
    path = source.path
    if path == PYTHON_DOCS:
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
    """The documents of a source, file after file, record after record.

    Raises DataError (file, line, fix) for what cannot be read; up to `skip_bad.allowed` bad records are passed over
    and counted instead.
    """
    here = Path(source.path).expanduser()
    if source.path == PYTHON_DOCS:
        yield from python_docs.documents()
    elif source.path.startswith(hub.PREFIX):
        yield from hub.read(source.path, source.field, skip_bad)
    elif here.is_dir() and hub.is_saved_dataset(here):
        yield from hub.read(str(here), source.field, skip_bad)
    else:
        for file in files(source):
            reader = formats.reader(file)
            assert reader is not None  # files() lists no others
            yield from reader(file, source.field, skip_bad)

"""What a document is, which records are refused, and how many refusals are forgiven.

A record is one JSON object or one parquet row; a document is its text. Everything here raises `DataError` that names
the file and the line, so that a user can go and look.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maxi.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """One text (never empty, always encodable as UTF-8) and where it came from, such as `books.jsonl:12`."""

    text: str
    where: str


@dataclass(slots=True)
class Budget:
    """How many bad records may be skipped; `skipped` counts those that were."""

    allowed: int = 0
    skipped: int = field(default=0, init=False)

    def forgive(self, error: DataError) -> None:
        """Counts one bad record; raises the error itself when the budget is used up."""
        if self.skipped >= self.allowed:
            spent = f" (after {self.skipped} skipped records)" if self.skipped else ""
            raise DataError(error.what + spent, error.where, error.fix)
        self.skipped += 1


def document_of(record: Any, field: str, where: str) -> Document:
    """The document in a record. Raises DataError when the field is missing, null, empty or not text."""
    if not isinstance(record, Mapping):
        raise DataError(f"a record is {_kind(record)}, not an object", where, f'write {{"{field}": "..."}}')
    if field not in record:
        raise missing(field, list(record), where)
    return document(record[field], field, where)


def document(text: Any, field: str, where: str) -> Document:
    """A checked document. NUL and other control characters pass; lone surrogates do not, they have no bytes."""
    if not isinstance(text, str):
        raise DataError(f"the field {field!r} is {_kind(text)}, not text", where, "mend it, or allow for it with data.skip_bad")
    if not text.strip():
        raise DataError(f"the field {field!r} is empty", where, "remove the record, or allow for it with data.skip_bad")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"the text has the lone surrogate U+{code:04X} at character {error.start}", where, "mend the escape"
        ) from None
    return Document(text, where)


def missing(field: str, names: list[str], where: str) -> DataError:
    """The error for a field that is not there, naming those that are and the closest."""
    close = difflib.get_close_matches(field, names, 1, 0.4)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"
    fix = f"set field: {close[0] if close else names[0] if names else '...'} on this source"
    return DataError(f"there is no field {field!r}, only {shown}", where, fix)


def _kind(value: Any) -> str:
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "int": "a number",
        "float": "a number",
        "bool": "a bool",
    }
    return names.get(type(value).__name__, type(value).__name__)

"""What a document is, which records are refused, and how many refusals are forgiven.

A record is one JSON object or one parquet row; a document is its text. Everything here raises `DataError` that names
the file and the line, so that a user can go and look. What a conversation is stands in `messages.py`.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from maxi.errors import DataError

T = TypeVar("T")

Make = Callable[[Any, str], T]
"""make(record, where) is what a record stands for; it raises DataError for a record that will not do."""


class Document(NamedTuple):
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


def made(records: Iterable[tuple[Any, str]], make: Make[T], budget: Budget) -> Iterator[T]:
    """Each (record, where) through `make`, in their order; a record that it refuses goes to the budget."""
    for record, where in records:
        try:
            found = make(record, where)
        except DataError as error:
            budget.forgive(error)
            continue
        yield found


def document_of(field: str, record: Any, where: str) -> Document:
    """The document in a record. Raises DataError when the field is missing, null, empty or not text."""
    if type(record) is not dict and not isinstance(record, Mapping):  # asking the abstract class is slow
        raise not_an_object(record, where, f'{{"{field}": "..."}}')
    if field not in record:
        raise missing(field, list(record), where)
    return document(record[field], field, where)


def document(text: Any, field: str, where: str) -> Document:
    """A checked document. NUL and other control characters pass; lone surrogates do not, they have no bytes."""
    if not isinstance(text, str):
        raise DataError(f"the field {field!r} is {kind(text)}, not text", where, "mend it, or allow for it with data.skip_bad")
    if not text.strip():
        raise DataError(f"the field {field!r} is empty", where, "remove the record, or allow for it with data.skip_bad")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise surrogate(error, where) from None
    return Document(text, where)


def not_an_object(record: Any, where: str, like: str) -> DataError:
    """The error for a record without named fields; `like` shows one that has them."""
    return DataError(f"a record is {kind(record)}, not an object", where, f"write {like}")


def surrogate(error: UnicodeEncodeError, where: str) -> DataError:
    """The error for a text that has no bytes."""
    what = f"the text has the lone surrogate U+{ord(error.object[error.start]):04X} at character {error.start}"
    return DataError(what, where, "mend the escape")


def missing(field: str, names: list[str], where: str) -> DataError:
    """The error for a field that is not there, naming those that are and the closest."""
    close = difflib.get_close_matches(field, names, 1, 0.4)
    fix = f"set field: {close[0] if close else names[0] if names else '...'} on this source"
    return DataError(f"there is no field {field!r}, only {shown(names)}", where, fix)


def shown(names: list[str]) -> str:
    """Names of fields, the first dozen."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list",
        "int": "a number",
        "float": "a number",
        "bool": "a bool",
    }
    return names.get(type(value).__name__, type(value).__name__)

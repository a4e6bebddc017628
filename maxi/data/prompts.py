"""Prompts from a file, for an evaluation: texts to continue, or conversations to answer.

A .txt holds a prompt a line; any other file holds records with `prompt` (a text or messages) or `messages`. What the
assistant says last is left out, so that rows to train on serve as prompts too. What a template makes of the messages
is its own matter, and so is whether it takes their roles.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maxi.data import streams
from maxi.data.documents import Budget, records
from maxi.errors import DataError
from maxi.sections import Source

Prompt = str | list[dict[str, Any]]

_LIKE = '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'


def read(path: str) -> Iterator[tuple[str, Prompt]]:
    """(where it is, the prompt) of each prompt of a file; blank lines of a .txt are passed over.

    Raises DataError for a file that cannot be read or has none, and for a record that holds no prompt.
    """
    found = False
    of_records = Path(path).suffix.lower() != ".txt"
    for where, prompt in records(Source(path=path), _prompt_of, Budget()) if of_records else _lines(path):
        found = True
        yield where, prompt
    if not found:
        raise DataError("the file has no prompt", path, "write one a line")


def _lines(path: str) -> Iterator[tuple[str, Prompt]]:
    for number, raw in streams.lines(Path(path).expanduser()):
        where = f"{path}:{number}"
        line = streams.decode(raw, where).removesuffix("\r")
        if line.strip():
            yield where, line


def _prompt_of(record: Any, where: str) -> tuple[str, Prompt]:
    if not isinstance(record, Mapping):
        raise DataError("the record is no object", where, f"write {_LIKE}")
    found = record.get("prompt") or record.get("messages")
    if isinstance(found, str) and found.strip():
        return where, found
    if not isinstance(found, list) or not found:
        raise DataError(f"there is no prompt, only {', '.join(record) or 'nothing'}", where, f"write {_LIKE}")
    for number, message in enumerate(found, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no role", where, f"write {_LIKE}")
    while found and found[-1]["role"] == "assistant":
        found = found[:-1]
    if not found:
        raise DataError("nobody but the assistant speaks", where, "let a user say something first")
    return where, [dict(message) for message in found]

"""JSON within bounds: one value of a text, or the elements of a list one after the other as its bytes stream.

A few bytes of JSON can stand for many of memory: `[],` becomes 64. So what is long must not hold too many values, and a
list is never held whole. What a value means is the callers' matter. Raises DataError that names file, line and column.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from maxi.data import streams
from maxi.errors import DataError

UNCOUNTED = 1 << 20
"""Characters up to which a value may hold whatever it does: 64 MB at the worst."""
MOST_VALUES = 2_000_000
"""Numbers, texts, lists and objects in one record; each takes 30 to 100 bytes."""

_TEXT = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BETWEEN = re.compile(r"[ \t\r\n]*")
_UNSURE = 16
"""How near the end of what is there an error may only mean that the rest is missing; `-Infinity` and `\\udbff\\udfff` fit."""
_MEND = "mend it, or allow for it with data.skip_bad"


def parse(text: str, path: str, line: int) -> Any:
    """The value of a text that begins at that line of a file."""
    check_values(text, f"{path}:{line}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise DataError(f"malformed JSON, {error.msg}", where, _MEND) from None
    except (RecursionError, ValueError) as error:
        raise _refused(error, f"{path}:{line}") from None


def check_values(text: str, where: str) -> None:
    """Raises DataError for a text that stands for too many values."""
    if len(text) > UNCOUNTED:
        bare = _TEXT.sub("", text)
        if sum(map(bare.count, ",[{")) > MOST_VALUES:
            raise DataError(f"the record holds over {MOST_VALUES:,} values", where, "split it, or keep only what is read")


def _refused(error: Exception, where: str) -> DataError:
    if isinstance(error, RecursionError):
        return DataError("the JSON is nested too deeply", where, "remove the record")
    return DataError(f"malformed JSON, {str(error)[:80]}", where, _MEND)  # a number of thousands of digits


def elements(pieces: Iterable[bytes], path: Path) -> Iterator[Any]:
    """The elements of a list, UTF-8 with or without a byte-order mark; no more of it is held than the longest of them."""
    text = _Growing(pieces, str(path))
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        while True:
            yield text.value()
            if text.peek() == "]":
                text.expect("]")
                break
            text.expect(",")
    if text.peek():
        raise text.malformed("Extra data", text.at)


class _Growing:
    """A text as far as it has been needed: what stands before `at` has been read."""

    def __init__(self, pieces: Iterable[bytes], path: str):
        self._pieces = (piece[at : at + UNCOUNTED] for piece in pieces for at in range(0, len(piece), UNCOUNTED))
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self.at = "", 0
        self._line, self._before, self._bytes = 1, 0, 0  # of what was dropped: its lines, and the length of the last one
        self._ended = False

    def peek(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            found = _BETWEEN.match(self._text, self.at)
            assert found is not None  # it matches nothing too
            self.at = found.end()
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.malformed(f"Expecting {character!r}" if character != "," else "Expecting ',' delimiter", self.at)
        self.at += 1

    def value(self) -> Any:
        """The value that comes next."""
        self.peek()
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut_off = error.pos + _UNSURE > len(self._text) or error.msg.startswith("Unterminated string")
                if not (cut_off and self._grow()):
                    raise self.malformed(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise _refused(error, self._where(self.at)[0]) from None
            else:
                if end + 2 < len(self._text) or not self._more():  # 1 may go on as 10, 1.5 or 1e+3 in the next piece
                    self.at = end
                    return found

    def malformed(self, what: str, at: int) -> DataError:
        return DataError(f"malformed JSON, {what}", ":".join(self._where(at)), "mend the file")

    def _where(self, at: int) -> tuple[str, str]:
        """The file with the line, and the column."""
        lines, last = self._text.count("\n", 0, at), self._text.rfind("\n", 0, at)
        column = at - last if lines else self._before + at + 1
        return f"{self._path}:{self._line + lines}", str(column)

    def _grow(self) -> bool:
        """Twice as much of the value that begins at `at`, so that a long one is not tried again for every piece."""
        held = len(self._text) - self.at
        if held > streams.MAX_LINE_BYTES:
            what = f"a record is over {streams.MAX_LINE_BYTES // 1_000_000} MB"
            raise DataError(what, self._where(self.at)[0], "split it into records")
        grown = self._more()
        while grown and len(self._text) - self.at < 2 * held and self._more():
            pass
        check_values(self._text, self._where(0)[0])  # growing has dropped what stood before the value
        return grown

    def _more(self) -> bool:
        """Another piece, in place of what has been read; if there is none, nothing changes."""
        if self._ended:
            return False
        piece = next(self._pieces, None)
        self._ended = piece is None
        try:
            more = self._decoder.decode(piece or b"", final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(
                "the list is not UTF-8", f"{self._path}, byte {self._bytes + error.start + 1}", "save it as UTF-8"
            ) from None
        self._bytes += len(piece or b"")
        if not more:
            return self._more()
        if self.at:
            lines, last = self._text.count("\n", 0, self.at), self._text.rfind("\n", 0, self.at)
            self._before = self.at - last - 1 if lines else self._before + self.at
            self._line += lines
        self._text, self.at = self._text[self.at :] + more, 0
        return True

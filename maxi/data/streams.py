"""The bytes of a file, plain or compressed, in pieces and within bounds.

No piece, line or expansion is unbounded: a line over MAX_LINE_BYTES, or a file that expands more than MAX_RATIO times
beyond MAX_FREE_BYTES, is refused while it streams, so that a bomb costs neither the memory nor the disk.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxi.data.patient import PatientFile
from maxi.errors import DataError

COMPRESSIONS = (".gz", ".zst")
MAX_LINE_BYTES = 100_000_000
MAX_RATIO = 1000
MAX_FREE_BYTES = 100_000_000

_PIECE = 1 << 20
# One zstd block of 4 bytes may stand for 128 KB, and the decoder hands out all that its input holds: feeding it 4 KB
# at a time keeps the worst piece at 128 MB.
_ZSTD_PIECE = 1 << 12


def pieces(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file. Raises DataError when it cannot be read, is truncated, damaged or a bomb."""
    try:
        if path.suffix not in COMPRESSIONS:
            with PatientFile(path) as file:
                while piece := file.read(_PIECE):
                    yield piece
            return
        expanded = 0
        for piece, consumed in _gunzip(path) if path.suffix == ".gz" else _unzstd(path):
            expanded += len(piece)
            check_ratio(expanded, consumed, f"{path}, offset {consumed}")
            if piece:
                yield piece
    except OSError as error:
        raise DataError(f"cannot read the file, {error.strerror or error}", str(path), "check the path and the disk") from None


def check_ratio(expanded: int, stored: int, where: str) -> None:
    """Raises DataError for what comes to many more bytes than are stored."""
    if expanded > MAX_FREE_BYTES and expanded > MAX_RATIO * stored:
        what = f"the file expands more than {MAX_RATIO} times (so far {expanded} bytes), like a bomb"
        raise DataError(what, where, "decompress it yourself if you trust it")


def lines(path: Path, blank: bool = True) -> Iterator[tuple[int, bytes]]:
    """Numbered lines (from 1) without their newline; a leading byte-order mark is dropped. Raises as `pieces` does.

    blank: whether lines of nothing are wanted; without, long stretches of them (there may be a hundred million in an archive
    of a hundred kilobytes) cost nothing, though single ones may come.
    """
    held: list[bytes] = []  # of a line whose end has not come: joined once, since a long one comes in many pieces
    size, number = 0, 0
    for piece in pieces(path):
        if not (blank or size) and not piece.strip():
            number += piece.count(b"\n")
            continue
        first, *others = piece.split(b"\n")
        held.append(first)
        size += len(first)
        if others:
            number += 1
            yield number, _line(b"".join(held), number, path)
            for line in others[:-1]:
                number += 1
                yield number, _line(line, number, path)
            held, size = [others[-1]], len(others[-1])
        _check_length(size, number + 1, path)
    if size:
        yield number + 1, _line(b"".join(held), number + 1, path)


def decode(line: bytes, where: str) -> str:
    """UTF-8 text. Raises DataError naming the column (from 1, in bytes)."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        what = f"the byte 0x{line[error.start]:02x} is not UTF-8"
        raise DataError(what, f"{where}:{error.start + 1}", "save the file as UTF-8") from None


def _check_length(size: int, number: int, path: Path) -> None:
    if size > MAX_LINE_BYTES:
        what = f"a line is over {MAX_LINE_BYTES // 1_000_000} MB"
        raise DataError(what, f"{path}:{number}", "split it into records or lines")


def _line(line: bytes, number: int, path: Path) -> bytes:
    _check_length(len(line), number, path)
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _gunzip(path: Path) -> Iterator[tuple[bytes, int]]:
    """(piece, compressed bytes read so far); members that follow each other are one stream, zero padding may end it."""
    with PatientFile(path) as file:
        inflate, pending = zlib.decompressobj(wbits=31), b""
        while data := pending or file.read(_PIECE):
            if inflate.eof:
                data = data.lstrip(b"\0")
                inflate = zlib.decompressobj(wbits=31) if data else inflate
            try:
                piece = inflate.decompress(data, _PIECE) if data else b""
            except zlib.error as error:
                raise _damaged(path, file.tell(), error) from None
            pending = inflate.unused_data if inflate.eof and data else inflate.unconsumed_tail
            yield piece, file.tell()
        yield inflate.flush(), file.tell()  # a few hundred bytes that the limit on a piece may have held back
        if not inflate.eof:
            raise _truncated(path, file.tell())


def _unzstd(path: Path) -> Iterator[tuple[bytes, int]]:
    import zstandard

    def start() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()

    with PatientFile(path) as file:
        inflate, pending, begun = start(), b"", False
        while data := pending or file.read(_ZSTD_PIECE):
            if inflate.eof:
                inflate = start()
            try:
                piece = inflate.decompress(data)
            except zstandard.ZstdError as error:
                raise _damaged(path, file.tell(), error) from None
            pending, begun = inflate.unused_data, True
            yield piece, file.tell()
        if not (inflate.eof and begun):
            raise _truncated(path, file.tell())


def _truncated(path: Path, offset: int) -> DataError:
    return DataError("the compressed file is truncated", f"{path}, offset {offset}", "copy or download it again")


def _damaged(path: Path, offset: int, error: Exception) -> DataError:
    return DataError(f"the compressed file is damaged, {error}", f"{path}, offset {offset}", "copy or download it again")

"""Storage that fails for a moment is asked again, from where it was; what does not pass ends with 75."""

import errno
import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from maxi.data import patient, streams
from maxi.errors import DataError, StorageFault

TEXT = b"".join(b"line %d\n" % n for n in range(200_000))


class Failing:
    """A file that fails at some of its reads."""

    def __init__(self, file: Any, fails: list[int]):
        self._file, self._fails = file, fails

    def read(self, size: int) -> bytes:
        if size and self._fails and self._fails[0] == 0:
            self._fails.pop(0)
            self._file.read(size // 2)  # the place is lost
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if size and self._fails:
            self._fails[0] -= 1
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(patient.time, "sleep", found.append)
    return found


def failing(monkeypatch: pytest.MonkeyPatch, fails: list[int]) -> None:
    opened = patient.open_file
    monkeypatch.setattr(patient, "open_file", lambda path: Failing(opened(path), fails))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_read_is_tried_again(suffix: str, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(TEXT, 0) if suffix else TEXT)
    failing(monkeypatch, [0, 1, 0, 0])
    assert b"".join(streams.pieces(path)) == TEXT
    assert waits == [0.5, 0.5, 1.0, 2.0]


def test_what_does_not_pass_is_75(tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    failing(monkeypatch, [0] * 9)
    with pytest.raises(StorageFault, match="storage does not answer, Input/output error") as fault:
        list(streams.lines(tmp_path / "a.txt"))
    assert fault.value.code == 75 and waits == list(patient.WAITS)


def test_what_is_for_good_is_not_tried_again(tmp_path: Path, waits: list[float]) -> None:
    with pytest.raises(DataError, match="No such file"):
        list(streams.pieces(tmp_path / "none.txt"))
    assert not waits

"""A .jsonl that grows by whole lines and outlives a full disk: what could not be written is kept and written later."""

import os
import stat
from pathlib import Path


class Lines:
    """Appends to the file `path`, which is made if need be. `add` never fails, `flush` may."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting: list[str] = []

    def add(self, line: str) -> None:
        """Puts a line down, now or as soon as that is possible again."""
        self._waiting.append(line + "\n")
        try:
            self._append()
        except OSError:
            return  # `flush` says so to whoever must know

    def flush(self) -> None:
        """All lines are in the file. Raises OSError when they are not; then the file ends with a whole line."""
        if self._waiting:
            self._append()
        if stat.S_ISREG(os.fstat(self._file).st_mode):
            os.fsync(self._file)  # a bucket that is mounted as a folder gets a file when it is synced, no sooner

    def _append(self) -> None:
        data, size = "".join(self._waiting).encode(), os.fstat(self._file).st_size
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self._waiting.clear()

    def close(self) -> None:
        os.close(self._file)

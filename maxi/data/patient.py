"""Files on storage that fails for a moment: a read is tried again, a few times and ever later, from where it was.

What a network filesystem answers while a server restarts is no reason to end a run of days; what does not pass within
seconds is, with the code that tells a scheduler to start the same command again.
"""

import errno
import time
from pathlib import Path
from typing import BinaryIO

from maxi.errors import StorageFault
from maxi.paths import open_file

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "ETIMEDOUT", "ESTALE", "ECONNRESET", "ECONNABORTED", "ENETDOWN", "ENETUNREACH"),
        *("ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EREMOTEIO"),
    )
    if hasattr(errno, name)
)
WAITS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each new try."""


class PatientFile:
    """A file open for reading in binary. Raises StorageFault for what does not pass, OSError for all that is for good."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0
        self._file: BinaryIO | None = None
        self.read(0)

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        for wait in (*WAITS, None):
            try:
                if self._file is None:
                    self._file = open_file(self._path)
                    self._file.seek(self._at)
                data = self._file.read(size)
            except OSError as error:
                if error.errno not in TRANSIENT:
                    raise
                self.close()
                if wait is None:
                    what = f"storage does not answer, {error.strerror} ({len(WAITS) + 1} tries)"
                    raise StorageFault(what, str(self._path), "run the same command again when it does") from None
                time.sleep(wait)
            else:
                self._at += len(data)
                return data
        raise AssertionError

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> "PatientFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

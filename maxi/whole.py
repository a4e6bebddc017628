"""Files that are at every moment either the old one or the new one: written aside, flushed to disk, renamed."""

import os
import threading
from contextlib import suppress
from pathlib import Path

from maxi import faults


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file; text as UTF-8. A process killed meanwhile leaves a hidden `.NAME.PID.THREAD` beside it at most, which
    the next one to write that file removes. Raises OSError, after which the old file stands."""
    faults.at(f"{path.name}.write")
    for left in path.parent.glob(f".{path.name}.*.*"):
        if not _lives(left):
            left.unlink(missing_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with aside.open("wb") as out:
            out.write(content.encode("utf-8") if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        faults.at(f"{path.name}.rename")
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    flush(path.parent)
    faults.at(f"{path.name}.renamed")


def flush(folder: Path) -> None:
    """The names in a folder, as they are now, survive a loss of power, where the filesystem can promise that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lives(left: Path) -> bool:
    """Whether the process that writes it may still be there."""
    pid = left.name.split(".")[-2]
    if not pid.isdigit():
        return True  # not of our making
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

"""Who trains in a run folder: one process at a time, known by host, pid, boot and start time.

The base is the kernel's flock, which ends with the process however that ends. What the file says serves errors, and decides
alone where the filesystem has no flock: an owner on this machine that is of another boot, dead, or another process with the
same pid is stale and taken over with a warning. A file that says nothing was left in order.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from maxi.errors import EnvironmentFault

log = logging.getLogger("maxi")

SETTLE = 0.2
"""Seconds after which two processes that took over at once, without flock, see which of them was last."""

_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class Owner:
    """A process: `boot` is the kernel's id of its boot, `ticks` its start in clock ticks since then, `since` for people."""

    host: str
    pid: int
    boot: str
    ticks: str
    since: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    @staticmethod
    def me() -> "Owner":
        return Owner(socket.gethostname(), os.getpid(), _boot(), _ticks(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))

    @staticmethod
    def read(text: str) -> "Owner | None":
        """None when nobody is named, or not in this way."""
        try:
            return Owner(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def gone(self) -> str | None:
        """Why the process cannot be there any more; None when it is, or when this machine cannot tell."""
        me = Owner.me()
        if self.host != me.host:
            return None
        if self.boot != me.boot:
            return "the machine was started since"
        ticks = _ticks(self.pid)
        return None if ticks and ticks == self.ticks else "it ended without a word"


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock file while the context lasts. Raises EnvironmentFault when somebody else does, OSError when the file
    cannot be written."""
    with path.open("a+", encoding="utf-8") as file:
        has_flock = _flock(path, file)
        before = _said(file)
        owner = Owner.read(before)
        if owner:
            reason = owner.gone() or ("the lock is free" if has_flock else None)
            if reason is None:
                fix = "wait for it; or, if it is gone, delete that file"
                raise EnvironmentFault(f"another process trains here, {owner}", str(path), fix)
            log.warning("warning: took over from %s (%s)", owner, reason)
        mine = json.dumps(asdict(Owner.me()))
        _say(file, mine)
        if not has_flock:
            time.sleep(SETTLE)
            if _said(file) != mine:
                raise EnvironmentFault("another process began to train here", str(path), "wait for it, or set another run_dir")
        try:
            yield
        finally:
            if _said(file) == mine:
                _say(file, "")


def _flock(path: Path, file: IO[str]) -> bool:
    """Whether the filesystem has locks; then this one is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return False
        owner = Owner.read(_said(file)) or "unknown"
        fix = "wait for it, or set another run_dir"
        raise EnvironmentFault(f"another process trains here, {owner}", str(path), fix) from None
    return True


def _said(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _say(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(f"{text}\n" if text else "")  # opened for appending: at the end, which is the beginning
    file.flush()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)); empty when there is no such process. Without /proc: the pid itself."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return str(pid)
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""

"""Named points where a test makes a run fail: `MAXI_FAULT=point:n[:what]`. Without it a point does nothing.

The n-th time (from 1) that the point is passed, `what` happens: kill (SIGKILL, the default), term, int and stop (those
signals to this process) or full (the disk is full: OSError). A file F that is written whole has the points F.write,
F.rename and F.renamed; the others are in POINTS. Nothing else of maxi knows that faults can be asked for.
"""

import errno
import os
import signal
import threading

POINTS = (
    "records.flush",
    "records.flushed",
    "save.begin",
    "save.written",
    "save.rename",
    "save.renamed",
    "retain.remove",
    "retain.removed",
    "export.write",
    "export.rename",
    "export.renamed",
    "cache.rename",
    "cache.renamed",
    "reference.rename",
    "reference.renamed",
)
"""Points beside those of whole files."""

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}


class _Armed:
    def __init__(self, wanted: str):
        point, number, *what = wanted.split(":")
        self.point, self.left, self.what = point, int(number), what[0] if what else "kill"
        self.lock = threading.Lock()  # some points are passed in the background
        assert self.what in {*_SIGNALS, "full"}, f"MAXI_FAULT={wanted}: kill, term, int, stop or full"


_armed = _Armed(os.environ["MAXI_FAULT"]) if os.environ.get("MAXI_FAULT") else None


def arm(wanted: str | None) -> None:
    """What MAXI_FAULT would say, for tests in this process; None: nothing any more."""
    global _armed
    _armed = _Armed(wanted) if wanted else None


def at(point: str) -> None:
    """Passes a point."""
    armed = _armed
    if armed is None or point != armed.point:
        return
    with armed.lock:
        armed.left -= 1
        now = armed.left == 0
    if now and armed.what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    if now:
        os.kill(os.getpid(), _SIGNALS[armed.what])

"""SIGTERM and SIGINT as a request to stop, with a limit to how long that may take.

The first signal asks; while a run is being prepared it raises at once, afterwards the loop stops behind the step under way.
A second signal, and the end of the grace, end the process there and then: what is on disk is whole at every moment. A
thread listens, so neither has to wait for a computation to come back to Python.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from maxi.errors import Preempted

SAME = 1.0
"""Seconds within which a second signal counts as the first: launchers and terminals may send one twice."""

INTERRUPTED = 130
"""The exit code of who was told twice, as a shell has it for Ctrl-C."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Asked(BaseException):
    """What a signal raises in the midst of anything: no library, and nothing of ours that waits for faults, may catch it."""


class StopRequest:
    """While entered, the first SIGTERM or SIGINT sets `asked` to its name.

    grace: seconds that stopping may take after `ready`; `where` names the run in what is said at the end.
    """

    def __init__(self, grace: float = 120.0, where: str = "") -> None:
        self.asked, self.grace, self.where = "", grace, where
        self._raises, self._raised, self._wake = True, False, -1
        self._before: dict[int, Any] = {}
        self._unraisable = sys.unraisablehook
        self._read, self._write = -1, -1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wake = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._tell
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
            threading.Thread(target=self._listen, daemon=True, name="signals").start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wake)
            os.close(self._write)  # which ends the thread
            sys.unraisablehook = self._unraisable
        if isinstance(error, _Asked) or (self._raised and error is None):
            raise self._early() from None

    def ready(self) -> None:
        """From now on there is something to save. Raises Preempted if somebody asked already."""
        self._raises = False
        if self.asked:
            raise self._early()

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
        if self._raises and not self._raised:
            self._raised = True
            raise _Asked

    def _tell(self, unraisable: Any) -> None:
        """In a destructor or a callback of the garbage collector Python only prints what is raised: `ready` and the end of
        the context remember that somebody asked."""
        if unraisable.exc_type is not _Asked:
            self._unraisable(unraisable)

    def _early(self) -> Preempted:
        return Preempted(f"{self.asked} before the first step, nothing was lost", self.where, "run the same command to go on")

    def _listen(self) -> None:
        """Ends the process when a second signal comes, or the grace is over."""
        first = None
        while True:
            left = None if first is None else max(0.0, first + self.grace - time.monotonic())
            ready, _, _ = select.select([self._read], [], [], left)
            if not ready:
                what = f"not saved within {self.grace:g} s of {self.asked}, ended as it was last saved"
                late = Preempted(what, self.where, "run the same command to go on")
                self._end(late.line(), late.code)
            got = os.read(self._read, 1)
            if not got:
                os.close(self._read)
                return
            now = time.monotonic()
            if got[0] not in SIGNALS:
                continue
            if first is None:
                first, self.asked = now, self.asked or signal.Signals(got[0]).name
            elif now - first > SAME:
                what = f"maxi: interrupted by a second signal, {signal.Signals(got[0]).name}; ended as it was last saved"
                self._end(what, INTERRUPTED)

    def _end(self, line: str, code: int) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)
        os._exit(code)

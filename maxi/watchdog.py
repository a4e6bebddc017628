"""A thread that looks whether a step takes far too long, and says where every thread of this process then is.

It ends nothing: a slow step may still end, and what is dead ends by the heartbeat. It reads the time that `events.py` keeps, so
compiling, evaluations and checkpoints are no steps to it.
"""

import faulthandler
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from maxi.events import Events

log = logging.getLogger("maxi")

ENOUGH = 5
"""Steps after which their median is worth something."""
AGAIN = 2.0
"""The same step is looked at again when it has taken this many times as long as at the last look."""
MOST = 20
"""Looks in one life; a machine that is slow at every tenth step should not fill the disk."""


class Watchdog:
    """While entered, writes the stacks of all threads to `file` when a step has taken `factor` times the median of those
    before it, and at least `seconds`; and again as long as the same step goes on. `factor` 0: never.

    `say` takes the one line that goes with it.
    """

    def __init__(self, events: Events, file: Path, factor: float, seconds: float, say: Callable[[str], None] = log.warning):
        self._events, self._file, self._factor, self._seconds, self._say = events, file, factor, seconds, say
        self._step, self._next, self._looks = 0, 0.0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def look(self) -> bool:
        """Whether the step under way is far too slow, in which case the stacks are written."""
        under_way = self._events.waiting()
        if under_way is None or len(under_way[2]) < ENOUGH or self._looks == MOST:
            return False
        step, seconds, before = under_way
        usual = median(before)
        if step != self._step:
            self._step, self._next = step, max(self._factor * usual, self._seconds)
        if seconds < self._next:
            return False
        self._next, self._looks = AGAIN * seconds, self._looks + 1
        with self._file.open("a", encoding="utf-8") as out:
            out.write(f"==== {time.strftime('%F %T')}: step {step} takes {seconds:.1f} s, the median is {usual:.3g} s\n")
            out.flush()
            faulthandler.dump_traceback(out)
        self._events.note("stall", step=step, seconds=seconds, median_s=usual, stacks=self._file.name)
        self._say(
            f"warning at step {step}: it takes {seconds:.1f} s so far, the median is {usual:.3g} s; "
            f"where every thread is stands in {self._file}{', no more will be written' * (self._looks == MOST)}"
        )
        return True

    def __enter__(self) -> "Watchdog":
        if self._factor:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 1.0)):
            self.look()

"""What a run spent its time on, life by life: events.jsonl, which every start appends to and nothing truncates.

A life is one start of the process. At every moment of it exactly one phase is under way, so nothing is counted twice: start-up
until the first batch is there, compile for the first step, then steps, between them evaluation, checkpoint and whatever else
is entered by name. A phase is written when it ends, steps in groups; a kill therefore loses the group under way.

Each line has `event`, `time` (seconds since 1970, for people and for the gaps between lives) and `at`, the seconds since this
life began by a clock that does not jump; durations are differences of the latter. `goodput.py` reads the file.
The trainer's loop sits in one thread; `waiting` may be asked from another.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from maxi.errors import MaxiError
from maxi.lines import Lines

START_UP, COMPILE, STEPS = "start-up", "compile", "steps"
"""The phases that the loop itself goes through; all others are entered by `Events.phase`."""
REMEMBERED = 101
"""Durations of steps that a median is taken of: the newest ones, since a run's speed may change."""

Shares = Callable[[list[float]], list[list[float]]]
"""What this process measured -> what all did, by process; called by every process, never waiting for another."""


class Events:
    """The phases of this life, and the file they go to.

    `path` is None in processes that write nothing; they keep time all the same. `every`: steps to a line. `about` is said of
    the life in its first line.
    """

    def __init__(
        self,
        path: Path | None,
        every: int,
        about: dict[str, Any] | None = None,
        shared: Shares | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._every, self._shared, self._clock, self._begin = every, shared, clock, clock()
        self._file = _append_to(path) if path else None
        self._base = self._phase = START_UP
        self._since, self._own = self._begin, 0.0
        self._step = self._written = 0
        self._waits = 0.0
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self.note("start", **(about or {}))

    def resumed(self, step: int) -> None:
        """The state is that of `step`: what earlier lives did beyond it is lost."""
        self._step = self._written = step
        self.note("resume", step=step)

    @contextmanager
    def phase(self, name: str, **about: Any) -> Iterator[None]:
        """Time inside belongs to `name`, with a line of its own that says `about`, and not to what is under way outside."""
        assert self._phase == self._base, f"{name} inside of {self._phase}"
        began = self._clock()
        self._own += began - self._since
        if self._base == STEPS:
            self._write_steps()
        self._phase = name
        try:
            yield
        finally:
            self._phase, self._since = self._base, self._clock()
            self.note(name, seconds=self._since - began, **about)
            if self._file is not None:
                with suppress(OSError):
                    self._file.flush()  # where the folder is a mounted bucket, it sees nothing sooner

    def stepping(self) -> None:
        """The loop begins: what comes next is the first step, which compiles."""
        self._write_base(COMPILE)

    def stepped(self, step: int, data_wait: float) -> None:
        """`step` was taken (dispatched, at least, and the one before it is done), after `data_wait` seconds without data."""
        if self._base == STEPS and self._step % self._every == 0:  # only now, as a phase may follow and wait for that step
            self._write_steps()
        now = self._clock()
        seconds, self._since, self._step = now - self._since, now, step
        self._own += seconds
        if self._base == COMPILE:
            self._written = step
            self._write_base(STEPS, step=step)
            return
        self._seconds.append(seconds)
        self._waits += data_wait

    def waiting(self) -> tuple[int, float, list[float]] | None:
        """The step under way, the seconds it has taken so far, and those of the steps before it, the newest last; None while
        no step is under way."""
        since = self._since
        return (self._step + 1, self._clock() - since, list(self._seconds)) if self._phase == STEPS else None

    def note(self, event: str, **values: Any) -> None:
        """Writes one line by one call, so that a kill tears at most the last; where the disk is full, as soon as it is not."""
        if self._file is None:
            return
        line = {"event": event, "time": time.time(), "at": self._clock() - self._begin} | values
        line = {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
        self._file.add(json.dumps(line, ensure_ascii=False))

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._shared = None  # another process may be why this life ends, and not answer
        if self._base == STEPS:
            self._own += self._clock() - self._since
            self._write_steps()
        else:
            self._write_base(self._base)
        self.note("stop", step=self._step, code=_code(error))
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write_base(self, following: str, **about: Any) -> None:
        """Ends START_UP or COMPILE."""
        now = self._clock()
        self.note(self._base, seconds=self._own + now - self._since, **about)
        self._base = self._phase = following
        self._own, self._since = 0.0, now

    def _write_steps(self) -> None:
        """The steps since the last line; time that passed without any stays for the next."""
        count = self._step - self._written
        if not count:
            return
        values: dict[str, Any] = {"first": self._written + 1, "last": self._step, "seconds": self._own}
        values["data_wait_s"] = self._waits
        if self._shared:
            mine = [round(self._own / count, 4), round(self._waits / count, 4)]
            step_s, data_wait_s = zip(*self._shared(mine), strict=True)
            values["hosts"] = {"step_s": step_s, "data_wait_s": data_wait_s}
        self.note(STEPS, **values)
        self._own, self._waits, self._written = 0.0, 0.0, self._step


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl in order, without those that a kill cut short."""
    found = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        whole = isinstance(values, dict) and all(isinstance(values.get(key), int | float) for key in ("time", "at"))
        if whole and isinstance(values.get("event"), str):
            found.append(values)
    return found


def _append_to(path: Path) -> Lines:
    """The file, for whole lines at its end; a torn line before them is ended first."""
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    file = Lines(path)
    if torn:
        file.add("")
    return file


def _code(error: BaseException | None) -> int:
    """The exit code that this end of a run leads to."""
    if error is None:
        return 0
    return error.code if isinstance(error, MaxiError) else 130 if isinstance(error, KeyboardInterrupt) else 1

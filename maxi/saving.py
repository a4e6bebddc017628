"""Saving as training goes on: what is fit to be saved, what a save that fails costs, and when it is time to give up.

A full disk, or one that takes no more writes, costs one line and the leftovers; the run goes on, since the checkpoint before
is as good as ever and the next may succeed. Errors of the background show at the next step. Of several processes one that
cannot save its part ends at once, and the others with it: they would wait for that part.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from maxi import processes
from maxi.checkpoint import Checkpoints
from maxi.errors import EnvironmentFault, MaxiError, NumericsError, first_line
from maxi.health import Health, weights_of
from maxi.step import State

FAILURES = 3
"""Saves in a row that may fail before a run of one process ends."""


class Saver:
    """Saves the states of one run. `flush` puts its records down, `say` shows a line, `where` names the run in errors."""

    def __init__(
        self, checkpoints: Checkpoints, health: Health, flush: Callable[[], None], say: Callable[[str], None], where: str
    ):
        self._checkpoints, self._health, self._flush, self._say, self._where = checkpoints, health, flush, say, where
        self._failures, self._step = 0, 0
        self._limit = FAILURES if processes.count() == 1 else 1

    def save(self, step: int, state: State) -> None:
        """Begins to save, once the records up to `step` are in their files.

        Raises NumericsError for weights that are not finite, EnvironmentFault for copies that differ, or when one save after
        the other fails.
        """
        self._try(lambda: self._checkpoints.wait(before=step))
        self._examine(step, state)
        self._step = step
        self._try(lambda: (self._flush(), self._checkpoints.save(step, state)))

    def poll(self, wait: bool = False) -> None:
        """At every step: looks whether the last save failed. Raises EnvironmentFault as `save` does."""
        self._try(self._checkpoints.wait if wait else self._checkpoints.poll)

    def finish(self, what: str) -> None:
        """Waits for the save of the last step. Raises EnvironmentFault when it failed; `what` says what is lost."""
        self.poll(wait=True)
        if self._failures:
            fix = "make room, and run the same command to go on from there"
            raise EnvironmentFault(f"{what}, but the disk did not take it; last saved: {self._last()}", self._where, fix)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            with processes.together():
                act()
            if self._checkpoints.saved == self._step:
                self._failures = 0
        except MaxiError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # Orbax wraps what the disk says in the other two
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._checkpoints.tidy()
        what = f"the checkpoint of step {self._step} could not be written, {reason(error)}"
        if self._failures >= self._limit:
            fix = "make room or mend the disk, and run the same command to go on from there"
            often = f", {self._limit} times in a row" if self._limit > 1 else ""
            raise EnvironmentFault(f"{what}{often}; last saved: {self._last()}", self._where, fix) from error
        self._say(f"warning: {what}; the run goes on, last saved: {self._last()} ({self._failures} of {self._limit})")

    def _last(self) -> str:
        steps = self._checkpoints.steps()
        return f"step {steps[-1]}" if steps else "nothing"

    def _examine(self, step: int, state: State) -> None:
        found = self._health(weights_of(state))
        if not found.finite:
            fix = "go back with --rewind R:S, or lower optim.lr with --allow-change optim.lr"
            raise NumericsError(f"the weights are not finite; last saved: {self._last()}", f"step {step}", fix)
        if found.differing:
            first, *others = found.differing
            more = f" and {len(others)} more" if others else ""
            what = f"copies of one weight hold different bits, {first}{more}; last saved: {self._last()}"
            raise EnvironmentFault(what, f"step {step}", "take that device out, and run the same command to go on from there")


def reason(error: BaseException) -> str:
    """What the disk said, in a few words, however many lines the library makes of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := re.search(r"(?:OS error |os_error_code=')(\d+)", str(error)):  # as tensorstore writes it
        return os.strerror(int(match[1]))
    return first_line(error, 150)

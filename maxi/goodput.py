"""`maxi report --goodput`: what share of a run's time became steps that count, and where the rest went.

A step counts if no later life began before it: what was done after the checkpoint that the next life took up is lost. Lives are
measured by their own steady clocks; only the gaps between them are differences of wall-clock times. The gap after a life that
ended with all done is nobody's loss (the run was over) and left out. Time after the last line of a life that was killed cannot
be told from the time nothing ran, and is counted as such.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from maxi.errors import DataError, ModelFolderError
from maxi.events import COMPILE, START_UP, STEPS, read_events
from maxi.run import Run
from maxi.whole import write_whole

LOST, DOWN, OTHER = "lost steps", "down", "other"
_ORDER = (STEPS, LOST, START_UP, COMPILE, "evaluation", "checkpoint")
"""Kinds of time that come first, in this order."""
_LAST = (OTHER, DOWN)
_MARKS = ("start", "resume", "stop", "stall")
"""Events that took no time of their own."""


@dataclass
class Life:
    """One start of the process."""

    began: float
    """By the wall clock."""
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max((float(event.get("at", 0.0)) for event in self.events), default=0.0)

    @property
    def resumed(self) -> float:
        """The step it went on from; infinite where it did not come that far, so that it took nothing away."""
        return next((event["step"] for event in self.events if event["event"] == "resume"), math.inf)

    @property
    def reached(self) -> int:
        """The last step that it is known to have taken, or went on from."""
        return max((event.get("last", event.get("step", 0)) for event in self.events if event["event"] != "stall"), default=0)

    @property
    def finished(self) -> bool:
        return any(event["event"] == "stop" and event.get("code") == 0 for event in self.events)


def goodput(folder: str | Path) -> dict[str, Any]:
    """`total_s`, `steps`, `lives`, `stalls`, `goodput` (a share) and `seconds` by kind, of a run folder.

    Raises ModelFolderError for what is no run folder or has no events.jsonl, DataError for one without a start.
    """
    run = Run(folder)
    if not run.events.is_file():
        what = "the run wrote no events.jsonl" if Run.is_run(folder) else "this is not a run folder"
        raise ModelFolderError(what, str(folder), "name the run_dir of a `maxi train`")
    lives = _lives(read_events(run.events))
    if not lives:
        raise DataError("no start is recorded", str(run.events), "run `maxi train` again")
    spent: dict[str, float] = dict.fromkeys((*_ORDER, *_LAST), 0.0)
    waits = 0.0
    for number, life in enumerate(lives):
        survive = min((later.resumed for later in lives[number + 1 :]), default=math.inf)
        waits += _add(spent, life, survive)
        if number and not lives[number - 1].finished:
            before = lives[number - 1]
            spent[DOWN] += max(life.began - before.began - before.seconds, 0.0)
    total = sum(spent.values())
    return {
        "run": str(folder),
        "lives": len(lives),
        "steps": next(life.reached for life in (*reversed(lives), Life(0.0)) if life.resumed < math.inf or not life.events),
        "stalls": sum(event["event"] == "stall" for life in lives for event in life.events),
        "total_s": total,
        "goodput": spent[STEPS] / total if total else 0.0,
        "data_wait_s": waits,
        "seconds": {name: spent[name] for name in sorted(spent, key=_place)},
    }


def run_goodput(folders: Sequence[str | Path], json_out: str | None = None, out: TextIO = sys.stdout) -> None:
    """Prints the table of each run; `json_out` is a file for the figures, or - to print them instead."""
    found = [goodput(folder) for folder in folders]
    if json_out == "-":
        out.write(json.dumps(found, indent=1) + "\n")
        return
    if json_out:
        write_whole(Path(json_out), json.dumps(found, indent=1) + "\n")
    for figures in found:
        out.write("\n".join(_table(figures)) + "\n")


def _lives(events: Sequence[dict[str, Any]]) -> list[Life]:
    lives: list[Life] = []
    for event in events:
        if event["event"] == "start":
            lives.append(Life(float(event["time"])))
        if lives:
            lives[-1].events.append(event)
    return lives


def _add(spent: dict[str, float], life: Life, survive: float) -> float:
    """Adds the time of one life by kind, of which steps after `survive` are lost; returns how much of those that count
    was without data."""
    known, waits = 0.0, 0.0
    for event in life.events:
        name, seconds = event["event"], float(event.get("seconds", 0.0))
        if name in _MARKS:
            continue
        known += seconds
        if name == STEPS:
            first, last = event["first"], event["last"]
            share = min(max((survive - first + 1) / (last - first + 1), 0.0), 1.0)
            spent[LOST] += (1 - share) * seconds
            waits += share * float(event.get("data_wait_s", 0.0))
            seconds *= share
        spent[name] = spent.get(name, 0.0) + seconds
    names = {event["event"] for event in life.events}
    unfinished = START_UP if START_UP not in names else COMPILE if COMPILE not in names and STEPS not in names else OTHER
    if life.finished or "stop" in names:
        unfinished = OTHER
    spent[unfinished] += max(life.seconds - known, 0.0)
    return waits


def _place(name: str) -> tuple[int, str]:
    if name in _ORDER:
        return _ORDER.index(name), name
    return len(_ORDER) + (1 + _LAST.index(name) if name in _LAST else 0), name


_SAID = {
    STEPS: "steps that count",
    LOST: "steps lost: done after the checkpoint that the next start took up",
    DOWN: "nothing running, between one start's last line and the next start",
    OTHER: "everything else",
    "state": "restoring a checkpoint, or making the first state",
}


def _table(figures: dict[str, Any]) -> list[str]:
    total = figures["total_s"]
    starts = f"{figures['lives']} start{'s' * (figures['lives'] != 1)}"
    stalls = f", {figures['stalls']} stalls" if figures["stalls"] else ""
    lines = [f"{figures['run']}: step {figures['steps']} after {_time(total)} and {starts}{stalls}"]
    for name, seconds in figures["seconds"].items():
        if not seconds and name != STEPS:
            continue
        lines.append(f"  {seconds / total if total else 0:7.1%} {_time(seconds):>10}  {_SAID.get(name, name)}")
        if name == STEPS and figures["data_wait_s"]:
            share = figures["data_wait_s"] / total
            lines.append(f"  {share:7.1%} {_time(figures['data_wait_s']):>10}    of it waiting for data")
    return lines


def _time(seconds: float) -> str:
    """1:02:03, or 4.5 s below a minute."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"

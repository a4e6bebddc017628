"""The account of a run's time: one phase at a moment, several lives, what a kill leaves; and the watchdog that reads it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from maxi.__main__ import main
from maxi.errors import ConfigError, Preempted, ProcessLost
from maxi.events import Events, read_events
from maxi.goodput import goodput
from maxi.watchdog import ENOUGH, MOST, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def live(path: Path, clock: Clock, resumed: int, last: int, *, killed: bool = False, **options: Any) -> None:
    """One life: 5 s of start-up, 2 of restoring, 20 of compiling, then steps of 1 s (0.25 without data), after every fourth an
    evaluation of 3 s and a checkpoint of 2."""
    events = Events(path, 2, clock=clock, **options)
    clock.pass_(5)
    with events.phase("state"):
        clock.pass_(2)
    events.resumed(resumed)
    events.stepping()
    for step in range(resumed + 1, last + 1):
        clock.pass_(20 if step == resumed + 1 else 1)
        events.stepped(step, 0.25)
        if step % 4 == 0:
            clock.pass_(0.5)  # until the step is done on the device
            for name, seconds in (("evaluation", 3), ("checkpoint", 2)):
                with events.phase(name, step=step):
                    clock.pass_(seconds)
    if not killed:
        events.__exit__(None, None, None)


def told(path: Path, *events: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in ("time", "at")} for e in read_events(path) if e["event"] in events]


def test_every_moment_belongs_to_one_phase(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    live(path, clock, 0, 7)
    assert told(path, "start-up", "state", "compile") == [
        {"event": "state", "seconds": 2.0},
        {"event": "start-up", "seconds": 5.0},
        {"event": "compile", "seconds": 20.0, "step": 1},
    ]
    assert told(path, "steps") == [
        {"event": "steps", "first": 2, "last": 2, "seconds": 1.0, "data_wait_s": 0.25},
        {"event": "steps", "first": 3, "last": 4, "seconds": 2.5, "data_wait_s": 0.5},
        {"event": "steps", "first": 5, "last": 6, "seconds": 2.0, "data_wait_s": 0.5},
        {"event": "steps", "first": 7, "last": 7, "seconds": 1.0, "data_wait_s": 0.25},
    ]
    assert told(path, "evaluation", "stop")[0] == {"event": "evaluation", "seconds": 3.0, "step": 4}
    assert told(path, "stop") == [{"event": "stop", "step": 7, "code": 0}]
    assert sum(e.get("seconds", 0) for e in read_events(path)) == read_events(path)[-1]["at"] == clock.now - 1000


def test_why_a_life_ended(tmp_path: Path) -> None:
    for number, (error, code) in enumerate(
        [(Preempted("SIGTERM"), 75), (ConfigError("x"), 2), (RuntimeError("x"), 1), (KeyboardInterrupt(), 130)]
    ):
        with pytest.raises(type(error)), Events(tmp_path / str(number), 1):
            raise error
        assert told(tmp_path / str(number), "stop") == [{"event": "stop", "step": 0, "code": code}]
        assert len(told(tmp_path / str(number), "start-up")) == 1


def test_step_times_of_every_host(tmp_path: Path) -> None:
    def shared(own: list[float]) -> list[list[float]]:
        return [own, [4.0, 3.0]]

    live(tmp_path / "events.jsonl", Clock(), 0, 3, shared=shared)
    assert told(tmp_path / "events.jsonl", "steps")[0]["hosts"] == {"step_s": [1.0, 4.0], "data_wait_s": [0.25, 3.0]}


def test_a_life_that_ends_asks_no_other_process(tmp_path: Path) -> None:
    """The one that is asked may be why it ends: its silence would stand in the place of the error."""

    def shared(_: list[float]) -> list[list[float]]:
        raise RuntimeError("UNAVAILABLE: recvmsg:Connection reset by peer")

    path, clock = tmp_path / "events.jsonl", Clock()
    with pytest.raises(ProcessLost), Events(path, 2, shared=shared, clock=clock) as events:
        events.stepping()
        for step in (1, 2):
            clock.pass_(1)
            events.stepped(step, 0.25)
        raise ProcessLost("gone")
    assert told(path, "steps") == [{"event": "steps", "first": 2, "last": 2, "seconds": 1.0, "data_wait_s": 0.25}]
    assert told(path, "stop") == [{"event": "stop", "step": 2, "code": 75}]


def run_of_three_lives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Killed after step 7 with its line torn, the second life stopped at once, the third finished at step 12; 100 s between."""
    folder.mkdir()
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: 1e9 + clock.now)
    path = folder / "events.jsonl"
    live(path, clock, 0, 7, killed=True)  # the checkpoint is that of step 4; what came after step 6 is in no line
    with path.open("a") as out:
        out.write('{"event": "ste')
    clock.pass_(100)
    with pytest.raises(ConfigError), Events(path, 2, clock=clock):
        clock.pass_(1)
        raise ConfigError("x")
    clock.pass_(100)
    live(path, clock, 4, 12)
    return folder


def test_goodput_of_several_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = goodput(run_of_three_lives(tmp_path / "run", monkeypatch))
    assert figures["seconds"] == pytest.approx(
        {
            "steps": 1 + 2.5 + (3 + 0.5 + 4 + 0.5),  # 2, 3-4; in the third life 6-8 and 9-12
            "lost steps": 2.0,  # 5-6
            "start-up": 5 + 1 + 5,
            "compile": 20 + 20,
            "evaluation": 3 + 3 + 3,
            "checkpoint": 2 + 2 + 2,
            "state": 2 + 2,
            "down": 100 + 100 + 0,
            "other": 1.0,  # step 7, of which no line tells
        }
    )
    assert figures["total_s"] == pytest.approx(sum(figures["seconds"].values()))
    assert figures["goodput"] == pytest.approx(11.5 / figures["total_s"])
    assert (figures["lives"], figures["steps"], figures["data_wait_s"]) == (3, 12, pytest.approx(0.25 * 10))


def test_what_comes_after_a_run_is_over_is_not_held_against_it(tmp_path: Path) -> None:
    path, clock = tmp_path / "events.jsonl", Clock()
    live(path, clock, 0, 8)
    before = goodput(tmp_path)
    clock.pass_(1e6)
    live(path, clock, 8, 8)  # the same command again, which says that all is done
    assert goodput(tmp_path)["seconds"]["down"] == 0
    assert goodput(tmp_path)["seconds"]["steps"] == before["seconds"]["steps"]


def test_goodput_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of_three_lives(tmp_path / "run", monkeypatch)
    assert main(["report", "--goodput", str(run), "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "step 12 after 0:04:44 and 3 starts" in out and "of it waiting for data" in out and "nothing running" in out
    assert main(["report", "--goodput", str(run), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out.json").read_text()) == [goodput(run)]
    for argv, code, words in (
        (["report", "--goodput", str(tmp_path)], 4, "not a run folder"),
        (["report", "--goodput", str(run), "--png", "x"], 2, "writes no page"),
        (["report", str(run), "--json", "-"], 2, "--json goes with --goodput"),
    ):
        assert main(argv) == code
        assert words in capsys.readouterr().err
    (run / "events.jsonl").write_text("{}\nx\n")
    assert main(["report", "--goodput", str(run)]) == 3


# ---- the watchdog ----


def steps_of(events: Events, clock: Clock, count: int) -> None:
    events.resumed(0)
    events.stepping()
    for step in range(1, count + 2):  # the first compiles
        clock.pass_(30 if step == 1 else 2)
        events.stepped(step, 0.0)


def test_a_step_ten_times_the_median_is_reported_and_again_when_twice_as_long(tmp_path: Path) -> None:
    clock, said = Clock(), []
    events = Events(tmp_path / "events.jsonl", 100, clock=clock)
    dog = Watchdog(events, tmp_path / "stacks-0.txt", 10, 1.0, said.append)
    steps_of(events, clock, ENOUGH)
    looks = []
    for _ in range(42):
        clock.pass_(1)
        looks += [int(clock.now)] * dog.look()
    assert [at - looks[0] for at in looks] == [0, 20] and looks[0] == int(clock.now) - 22  # at 20 s and at 40
    assert "warning at step 7: it takes 20.0 s so far, the median is 2 s" in said[0] and len(said) == 2
    text = (tmp_path / "stacks-0.txt").read_text()
    assert text.count("==== ") == 2 and "step 7 takes 40.0 s" in text and "test_events.py" in text
    assert [event["seconds"] for event in told(tmp_path / "events.jsonl", "stall")] == [20.0, 40.0]


def test_it_looks_neither_into_pauses_nor_before_it_knows_the_usual(tmp_path: Path) -> None:
    clock = Clock()
    events = Events(None, 100, clock=clock)
    dog = Watchdog(events, tmp_path / "stacks-0.txt", 10, 1.0, pytest.fail)
    clock.pass_(1e4)
    assert not dog.look()  # starting
    steps_of(events, clock, ENOUGH - 1)
    clock.pass_(1e4)
    assert not dog.look()
    events.stepped(ENOUGH + 1, 0.0)
    for name in ("evaluation", "checkpoint"):
        with events.phase(name):
            clock.pass_(1e4)
            assert not dog.look()
    assert not dog.look() and not (tmp_path / "stacks-0.txt").exists()


def test_a_short_step_is_no_stall_and_there_is_an_end_to_reports(tmp_path: Path) -> None:
    clock, said = Clock(), []
    events = Events(None, 100, clock=clock)
    dog = Watchdog(events, tmp_path / "stacks-0.txt", 10, 30.0, said.append)
    steps_of(events, clock, 50)
    clock.pass_(25)
    assert not dog.look()  # ten times the median, but not worth a report
    for step in range(60, 60 + 3 * MOST):
        clock.pass_(35)
        dog.look()
        events.stepped(step, 0.0)
        for quick in range(3):
            clock.pass_(2)
            events.stepped(step + quick, 0.0)
    assert len(said) == MOST and "no more" in said[-1] and "no more" not in said[-2]


def test_the_thread_sees_a_slow_step(tmp_path: Path) -> None:
    events, said = Events(None, 100), []
    with Watchdog(events, tmp_path / "stacks-0.txt", 10, 0.1, said.append):
        events.stepping()
        for step in range(1, ENOUGH + 2):
            events.stepped(step, 0.0)
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said and "test_the_thread_sees_a_slow_step" in (tmp_path / "stacks-0.txt").read_text()
    with Watchdog(events, tmp_path / "other.txt", 0, 0.1, pytest.fail):
        time.sleep(0.2)

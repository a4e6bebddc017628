"""A stop is asked for once, answered in time, and forced by a second signal."""

import signal
import sys
import threading
import time
from typing import Any

import pytest

from maxi import signals
from maxi.errors import ModelFolderError, Preempted
from maxi.signals import StopRequest


class _ThreadOver(Exception):
    """Ends the listening thread where the process would end."""


class Ended(list[Any]):
    """What `_end` was told, in a test that goes on."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    found = Ended()

    def end(_: StopRequest, line: str, code: int) -> None:
        found.append((line, code))
        raise _ThreadOver

    monkeypatch.setattr(StopRequest, "_end", end)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    return found


def wait_for(found: Ended) -> None:
    until = time.monotonic() + 10
    while not found and time.monotonic() < until:
        time.sleep(0.01)


def test_before_the_first_step_it_raises() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM before the first step, nothing was lost") as caught, StopRequest():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 75 and signal.getsignal(signal.SIGTERM) is before


def test_before_the_first_step_nothing_that_looks_for_faults_stops_it() -> None:
    """What reads a checkpoint turns every ValueError of its library into one about the checkpoint, and Preempted is one."""
    with pytest.raises(Preempted, match="SIGINT before the first step"), StopRequest():
        try:
            signal.raise_signal(signal.SIGINT)
        except Exception as error:
            raise ModelFolderError("cannot restore", "a step") from error


class _AsksWhenItGoes:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("ready", [True, False])
def test_before_the_first_step_it_is_not_lost_in_a_destructor(ready: bool, capfd: pytest.CaptureFixture[str]) -> None:
    hook, after = sys.unraisablehook, []
    with pytest.raises(Preempted, match="SIGTERM before the first step"), StopRequest() as stop:
        _AsksWhenItGoes()
        after.append("went on")
        if ready:
            stop.ready()
            after.append("not here")
    assert after == ["went on"] and capfd.readouterr().err == "" and sys.unraisablehook is hook


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_afterwards_it_asks(number: signal.Signals, ended: Ended) -> None:
    with StopRequest() as stop:
        stop.ready()
        assert not stop.asked
        for _ in range(3):  # launchers pass a signal on that the process got already
            signal.raise_signal(number)
        assert stop.asked == number.name
        time.sleep(0.05)
    assert not ended


def test_a_second_signal_ends_it(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME", 0.05)
    with StopRequest() as stop:
        stop.ready()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert not ended
        signal.raise_signal(signal.SIGINT)
        wait_for(ended)
    assert ended == [("maxi: interrupted by a second signal, SIGINT; ended as it was last saved", 130)]


def test_the_grace_ends_it(ended: Ended) -> None:
    with StopRequest(grace=0.1, where="runs/a") as stop:
        stop.ready()
        signal.raise_signal(signal.SIGTERM)
        wait_for(ended)
    assert ended[0][1] == 75
    assert ended[0][0].startswith("maxi: error[75] not saved within 0.1 s of SIGTERM, ended as it was last saved (runs/a)")


def test_other_signals_are_not_ours(ended: Ended) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopRequest(grace=0.05) as stop:
            stop.ready()
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.2)
            assert not stop.asked and not ended
    finally:
        signal.signal(signal.SIGUSR1, before)

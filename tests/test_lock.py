"""Who may train in a folder: one live process, known exactly; a stale owner is taken over from, and said so."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from maxi import lock
from maxi.errors import EnvironmentFault
from maxi.lock import Owner, held


def write(path: Path, **changes: Any) -> Owner:
    owner = replace(Owner.me(), **changes)
    path.write_text(json.dumps(asdict(owner)))
    return owner


@pytest.fixture
def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    return iter(())


def test_held_and_let_go(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "lock"
    for _ in range(2):
        with held(path):
            owner = Owner.read(path.read_text())
            assert owner and owner.pid == os.getpid() and owner.gone() is None
        assert path.read_text() == "" and not caplog.text


def test_another_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    owner = write(path, pid=77, host="elsewhere", since="2026-01-01 00:00:00")
    with path.open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentFault, match="trains here, pid 77 on elsewhere since 2026-01-01"), held(path):
            pass
    assert Owner.read(path.read_text()) == owner


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_stale_owner_is_taken_over_from(
    has_flock: bool, tmp_path: Path, dead: int, caplog: Any, request: pytest.FixtureRequest
) -> None:
    if not has_flock:
        request.getfixturevalue("no_flock")
    path = tmp_path / "lock"
    for changes, reason in (
        ({"pid": dead}, "it ended without a word"),
        ({"boot": "another"}, "the machine was started since"),
        ({"ticks": "1"}, "it ended without a word"),  # somebody else has its pid now
    ):
        owner = write(path, **changes)
        caplog.clear()
        with held(path):
            assert f"warning: took over from {owner} ({reason})" in caplog.text
            assert Owner.read(path.read_text()) == Owner.me() or Owner.read(path.read_text())


@pytest.mark.usefixtures("no_flock")
def test_without_flock_what_the_file_says_decides(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write(path, pid=child.pid, ticks=lock._ticks(child.pid))
        with pytest.raises(EnvironmentFault, match=f"pid {child.pid} on .*delete that file"), held(path):
            pass
    finally:
        child.communicate(b"\n")
    with held(path):
        pass
    write(path, host="elsewhere")
    with pytest.raises(EnvironmentFault, match="on elsewhere since"), held(path):
        pass


@pytest.mark.usefixtures("no_flock")
def test_of_two_that_take_over_at_once_one_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    monkeypatch.setattr(time, "sleep", lambda _: write(path, pid=1, host="elsewhere"))
    with pytest.raises(EnvironmentFault, match="another process began to train here"), held(path):
        pass


def test_a_file_that_says_nothing_known_is_free(tmp_path: Path) -> None:
    for text in ("", "pid 12 on host", "{", '{"host": 1}', "[]"):
        (tmp_path / "lock").write_text(text)
        with held(tmp_path / "lock"):
            pass

"""Files that are whole or not there, lines that outlive a full disk, and the points where tests make either fail."""

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maxi import faults, lines
from maxi.lines import Lines
from maxi.tensorboard import EventFiles
from maxi.whole import write_whole
from tests import breakages, soak

ROOT = Path(__file__).parent.parent
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(autouse=True)
def nothing_armed() -> Iterator[None]:
    yield
    faults.arm(None)


def test_points_are_those_of_the_code() -> None:
    found = set()
    for path in (ROOT / "maxi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.at" and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    assert found == set(faults.POINTS)
    assert set(soak.POINTS) - {p for p in soak.POINTS if p.rsplit(".", 1)[0] in soak.WHOLE} <= found


@pytest.mark.parametrize(("what", "code"), [("", -signal.SIGKILL), (":term", -signal.SIGTERM), (":full", 1)])
def test_a_point_acts_the_nth_time_it_is_passed(what: str, code: int, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from maxi.whole import write_whole\n"
    script += "for n in range(4): write_whole(Path(sys.argv[1]), str(n))"
    env = {**os.environ, "MAXI_FAULT": f"a.rename:3{what}"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], env=env, capture_output=True, check=False)
    assert done.returncode == code and (tmp_path / "a").read_text() == "1"
    left = list(tmp_path.glob(".a.*"))
    assert len(left) == (0 if what == ":full" else 1)
    write_whole(tmp_path / "a", "5")
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "what the dead process left is gone"


@pytest.mark.parametrize("point", ["write", "rename"])
def test_a_file_that_cannot_be_written_stays_as_it_was(point: str, tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "old")
    faults.arm(f"a.{point}:1:full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_lines_wait_for_room_and_the_file_ends_with_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, room = tmp_path / "a.jsonl", os.write, [1 << 20]

    def limited(handle: int, data: bytes) -> int:
        if not room[0]:
            raise FULL
        taken = write(handle, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(lines.os, "write", limited)
    made = Lines(path)
    made.add("one")
    room[0] = 6
    made.add("three is too long")
    assert path.read_text() == "one\n"
    with pytest.raises(OSError, match="No space left"):
        made.flush()
    made.add("four")
    room[0] = 1 << 20
    made.flush()
    made.close()
    assert path.read_text() == "one\nthree is too long\nfour\n"


def test_events_outlive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = EventFiles(tmp_path / "events", start=4)
    events.write(5, {"train/loss": 1.0, "text": "is no number"})

    def full() -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(events._writer, "flush", full)
        for step in range(6, 40):
            events.write(step, {"train/loss": 1.0})
    events.close()
    (file,) = (tmp_path / "events").iterdir()
    assert file.read_bytes().count(b"train/loss") == 35 and b"is no number" not in file.read_bytes()


def test_breakages_still_fit_the_code() -> None:
    """`make breakages` runs them; here it is only seen that each would still break something, and that its tests exist."""
    assert len(breakages.BREAKAGES) == 7
    for breakage in breakages.BREAKAGES:
        for file, right, wrong in breakage.changes:
            text = (ROOT / file).read_text("utf-8")
            assert text.count(right) == 1, breakage.name
            compile(text.replace(right, wrong), file, "exec")
        path, name = breakage.tests.split("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text("utf-8"), breakage.tests

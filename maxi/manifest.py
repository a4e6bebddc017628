"""The sha256 of every file of a checkpoint, and the mark that says that it is whole.

    manifest.N.json   of process N: {"files": {path: [bytes, sha256]}}, paths relative to the step's folder
    commit.json       {"step", "manifests": {name: sha256}}: the mark, written by the first process after all manifests

A process answers for the files that Orbax names after it (`ocdbt.process_N`), the first one for all others too. Hashes are
taken of what can be read back once Orbax has finished. A folder without the mark is no checkpoint, and one whose files say
anything else than its manifests is damaged. Files that no manifest names are nobody's business here.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maxi.whole import write_whole

COMMIT = "commit.json"
FORMAT = 1
WAIT = 600.0
"""Seconds that the first process waits for the manifests of the others."""

_OWNED = re.compile(r"process_(\d+)$")


def write(folder: Path, process: int | None) -> None:
    """The manifest of this process's files; None: the only one, of everybody's. Raises OSError."""
    mine = [path for path in _files(folder) if process is None or _owner(path) == process]
    hashes = _hashes(folder, mine)
    table = {path: [(folder / path).stat().st_size, digest] for path, digest in zip(mine, hashes, strict=True)}
    write_whole(folder / f"manifest.{process or 0}.json", json.dumps({"format": FORMAT, "files": table}, indent=1) + "\n")


def commit(folder: Path, step: int, processes: int, wait: float = WAIT) -> None:
    """The mark, once every process's manifest is there. Raises OSError, TimeoutError among them."""
    names = [f"manifest.{process}.json" for process in range(processes)]
    until = time.monotonic() + wait
    while missing := [name for name in names if not (folder / name).is_file()]:
        if time.monotonic() > until:
            raise TimeoutError(None, f"{missing[0]} did not appear within {wait:.0f} s", str(folder))
        time.sleep(0.05)
    table = dict(zip(names, _hashes(folder, names), strict=True))
    write_whole(folder / COMMIT, json.dumps({"format": FORMAT, "step": step, "manifests": table}, indent=1) + "\n")


def is_committed(folder: Path) -> bool:
    """Whether the mark is there, whatever it says."""
    return (folder / COMMIT).is_file()


def size(folder: Path) -> int:
    """Bytes that the manifests name; 0 where they cannot be read."""
    try:
        return sum(length for table in _tables(folder) for length, _ in table.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


def damage(folder: Path, step: int, items: Iterable[str] = (), share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the checkpoint of `step`, in a few words; None when every file is as it was written.

    items: look at these of its folders alone (and at what belongs to all); share (i, n): part i of n of the files.
    """
    try:
        mark = json.loads((folder / COMMIT).read_text("utf-8"))
        if mark["step"] != step:
            return f"{COMMIT} is that of step {mark['step']}"
        for name, digest in mark["manifests"].items():
            if _hashes(folder, [name]) != [digest]:
                return f"sha256 of {name} differs"
        expected = {path: entry for table in _tables(folder) for path, entry in table.items()}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    wanted = tuple(f"{item}/" for item in items)
    chosen = sorted(path for path in expected if not wanted or "/" not in path or path.startswith(wanted))[share[0] :: share[1]]
    for path in chosen:
        try:
            found = (folder / path).stat().st_size
        except OSError:
            return f"{path} is missing"
        if found != expected[path][0]:
            return f"{path} has {found} bytes instead of {expected[path][0]}"
    try:
        hashes = _hashes(folder, chosen)
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read, {error.strerror}"
    return next(
        (f"sha256 of {path} differs" for path, sha in zip(chosen, hashes, strict=True) if sha != expected[path][1]), None
    )


def _tables(folder: Path) -> list[dict[str, list[Any]]]:
    mark = json.loads((folder / COMMIT).read_text("utf-8"))
    return [json.loads((folder / name).read_text("utf-8"))["files"] for name in mark["manifests"]]


def _files(folder: Path) -> list[str]:
    found = (Path(home) / name for home, _, names in os.walk(folder) for name in names)
    paths = sorted(path.relative_to(folder).as_posix() for path in found)
    return [path for path in paths if path != COMMIT and not re.fullmatch(r"\.?manifest\.\d+\.json.*", path)]


def _owner(path: str) -> int:
    numbers = [int(match.group(1)) for part in path.split("/") if (match := _OWNED.search(part))]
    return numbers[0] if numbers else 0


def _hashes(folder: Path, paths: list[str]) -> list[str]:
    """Of several files at a time: hashing lets go of the interpreter."""

    def one(path: str) -> str:
        with (folder / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if len(paths) <= 1:
        return [one(path) for path in paths]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(one, paths))

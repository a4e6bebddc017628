"""The folders of checkpoints: which steps are there, how one is put there, and which ones go.

    STEP/               a checkpoint, with its mark (see manifest.py) since before it had this name
    .saving-STEP/       one being written, and Orbax's own folders beside it; left behind by a kill, the next run removes them
    .replaced-STEP/     one that was damaged, while another takes its place
    rewound-N/STEP/     what a rewind went back behind

Every other name, and a STEP without a mark, is foreign: it is passed over, and moved out of the way but never removed.
"""

import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from maxi import faults, manifest
from maxi.whole import flush

log = logging.getLogger("maxi")

_SAVING, _REPLACED = ".saving-", ".replaced-"
_ORBAX = "_CHECKPOINT_METADATA"


def steps(folder: Path) -> list[int]:
    """Steps with a mark, ascending."""
    return [step for step in _numbered(folder) if manifest.is_committed(folder / str(step))]


def unmarked(folder: Path) -> list[int]:
    """Folders named like steps, without a mark, ascending."""
    return [step for step in _numbered(folder) if not manifest.is_committed(folder / str(step))]


def looks_written(folder: Path, step: int) -> bool:
    """Whether Orbax has finished something in the folder of a step."""
    return (folder / str(step) / _ORBAX).is_file()


def saving(folder: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return folder / f"{_SAVING}{step}"


def sweep(folder: Path) -> None:
    """Removes what killed runs, or a save that failed, left of checkpoints; only for who holds the run's lock.

    When one of Orbax's writes fails the others are still under way for a moment: what they write is waited for.
    """
    for wait in (0.0, 0.1, 0.2, 0.4, 0.8):
        time.sleep(wait)
        left = [*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_REPLACED}*")]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        if not any(path.exists() for path in left):
            return


def publish(folder: Path, step: int) -> None:
    """Gives a marked checkpoint its name. One of that name goes if it has a mark (then this is the same step once more);
    anything else is moved aside. Raises OSError."""
    target, replaced = folder / str(step), folder / f"{_REPLACED}{step}"
    faults.at("save.rename")
    if target.exists():
        if target.is_dir() and manifest.is_committed(target):
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        else:
            log.warning("warning: %s was no checkpoint of this run and is now %s", target, _move_aside(target))
    saving(folder, step).rename(target)
    flush(folder)
    faults.at("save.renamed")
    shutil.rmtree(replaced, ignore_errors=True)


def retain(folder: Path, keep: int, damaged: Iterable[int] = ()) -> None:
    """Removes all but the newest `keep` steps, and of the damaged ones those that a good one follows.

    Damaged steps do not count, so that a good one is always left if there is one.
    """
    bad = set(damaged)
    good = [step for step in steps(folder) if step not in bad]
    for step in [*good[:-keep], *(step for step in sorted(bad) if good and step < good[-1])]:
        faults.at("retain.remove")
        old = folder / f"{_REPLACED}{step}"
        try:
            (folder / str(step)).rename(old)  # from one moment to the next it is no checkpoint any more
        except OSError:
            continue  # somebody removed it, or the disk lets nobody write: it stays
        shutil.rmtree(old, ignore_errors=True)
        faults.at("retain.removed")


def set_aside(folder: Path, after: int) -> Path | None:
    """Moves every marked step later than `after` into a folder of its own and returns it; None when there is none."""
    late = [step for step in steps(folder) if step > after]
    if not late:
        return None
    number = next(n for n in range(1, 1 << 20) if not (folder / f"rewound-{n}").exists())
    home = folder / f"rewound-{number}"
    home.mkdir()
    for step in reversed(late):  # a kill in between leaves the earlier ones, which are as good
        (folder / str(step)).rename(home / str(step))
    flush(folder)
    return home


def _numbered(folder: Path) -> list[int]:
    try:
        names = [path.name for path in folder.iterdir() if path.name.isascii() and path.name.isdigit() and path.is_dir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name == str(int(name)))


def _move_aside(path: Path) -> Path:
    free = next(n for n in range(1, 1 << 20) if not path.with_name(f"{path.name}.foreign-{n}").exists())
    aside = path.with_name(f"{path.name}.foreign-{free}")
    path.rename(aside)
    return aside

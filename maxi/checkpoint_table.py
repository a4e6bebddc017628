"""`maxi checkpoint list|verify|adopt RUN`: which checkpoints a run has, and whether they are as they were written.

Neither jax nor Orbax is loaded: files are all that is looked at.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from maxi import lock, manifest, shelf
from maxi.errors import ModelFolderError
from maxi.run import Run


def list_checkpoints(run_dir: str, out: TextIO) -> None:
    """A line a checkpoint: step, size, when it was written, what is known of it. Raises ModelFolderError for no run."""
    _table(run_dir, out, hashed=False)


def verify_checkpoints(run_dir: str, out: TextIO) -> None:
    """The same with every file hashed. Raises ModelFolderError when one is damaged."""
    if bad := _table(run_dir, out, hashed=True):
        fix = "training goes on from the newest that is whole; a damaged one may be deleted"
        raise ModelFolderError(f"{len(bad)} damaged: {', '.join(bad)}", str(_folder(run_dir)), fix)


def adopt_checkpoints(run_dir: str, out: TextIO) -> None:
    """Gives checkpoints without a mark, such as those of an earlier version, manifests of their files as they are now.

    Raises ModelFolderError when there are none, EnvironmentFault when somebody trains there.
    """
    folder = _folder(run_dir)
    with lock.held(Run(run_dir).folder / "lock"):
        bare = [step for step in shelf.unmarked(folder) if shelf.looks_written(folder, step)]
        if not bare:
            raise ModelFolderError("every checkpoint has its mark", str(folder), "there is nothing to adopt")
        for step in bare:
            home = folder / str(step)
            for stale in home.glob("manifest.*.json"):
                stale.unlink()
            manifest.write(home, process=None)
            manifest.commit(home, step, processes=1)
            print(f"step {step}: adopted as it is, {manifest.size(home) / 2**20:.1f} MiB", file=out)


def _table(run_dir: str, out: TextIO, hashed: bool) -> list[str]:
    """Prints it; returns what is damaged."""
    folder, bad = _folder(run_dir), []
    rows = list(_rows(folder, hashed))
    for step, mib, state in rows:
        print(f"{step:>10}  {mib:>9}  {state}", file=out)
        bad += [f"step {step}"] if state.startswith("corrupt") else []
    if not rows:
        print(f"no checkpoints in {folder}", file=out)
    return bad


def _rows(folder: Path, hashed: bool) -> Iterator[tuple[str, str, str]]:
    yield from ((str(step), *_state(folder / str(step), step, hashed)) for step in shelf.steps(folder))
    for step in shelf.unmarked(folder):
        written = shelf.looks_written(folder, step)
        yield str(step), "", f"no {manifest.COMMIT}, passed over" + ("; `maxi checkpoint adopt` trusts it" if written else "")
    for aside in sorted(folder.glob("rewound-*")):
        steps = ", ".join(map(str, shelf.steps(aside)))
        yield aside.name, "", f"set aside by a rewind: {steps}"


def _state(folder: Path, step: int, hashed: bool) -> tuple[str, str]:
    mib = f"{manifest.size(folder) / 2**20:.1f} MiB"
    if not hashed:
        return mib, "whole when written"
    reason = manifest.damage(folder, step)
    return mib, f"corrupt: {reason}" if reason else "verified"


def _folder(run_dir: str) -> Path:
    if not Run.is_run(run_dir):
        raise ModelFolderError("not a run folder", run_dir, "name the run_dir of a config")
    return Run(run_dir).checkpoints

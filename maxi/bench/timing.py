"""How long calls take, and where figures go: tables for people, one JSON object for programs."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from maxi import __version__
from maxi.errors import ConfigError
from maxi.run import write_whole

Call = Callable[[], Any]

BUDGET_S = 0.6
"""What `interleaved` aims to spend on a call."""
FEWEST, MOST = 5, 50
"""Bounds of how often it times one."""
SHORT_S = 2e-3
"""On accelerators shorter calls are queued until they take so long together, or starting them would be all the time."""


class Timing(NamedTuple):
    """Seconds of a call: the median, the least and the most of `runs`."""

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def clock(call: Call, repeats: int = 1) -> float:
    """Seconds until everything that `call` returns is there, a mean over calls that are queued behind each other."""
    start = time.perf_counter()
    for _ in range(repeats):
        out = call()
    jax.block_until_ready(out)  # type: ignore[possibly-undefined]
    return (time.perf_counter() - start) / repeats


def interleaved(calls: Sequence[Call]) -> list[Timing]:
    """Every call timed in turns, so that what disturbs the machine for a while disturbs all of them.

    On CPU each waits for the one before, since XLA computes independent calls there at the same time.
    """
    queued = jax.default_backend() != "cpu"
    for call in calls:
        clock(call)
    first = [clock(call) for call in calls]
    repeats = [max(1, round(SHORT_S / seconds)) if queued else 1 for seconds in first]
    mean = sum(seconds * n for seconds, n in zip(first, repeats, strict=True)) / len(calls)
    rounds = min(MOST, max(FEWEST, int(BUDGET_S / mean)))
    took = [[clock(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(rounds)]
    return [Timing.of(seconds) for seconds in zip(*took, strict=True)]


@contextmanager
def without_cache() -> Iterator[None]:
    """Programs are neither read from jax's cache of compiled ones nor put there."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def about_this_machine(devices: Sequence[Any]) -> dict[str, Any]:
    """What figures have to be read with."""
    first = devices[0]
    versions = {"maxi": __version__, "jax": jax.__version__}
    return {"platform": first.platform, "device": first.device_kind, "devices": len(devices), "versions": versions}


def console() -> Console:
    """Where tables are drawn: as wide as the terminal, and in a file as wide as they need."""
    found = Console(highlight=False, markup=False, soft_wrap=True)
    return found if found.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=160)


def check_writable(path: str | None) -> None:
    """Raises ConfigError, before anything is computed, where `keep` could not write."""
    if path is not None and not Path(path).expanduser().parent.is_dir():
        raise ConfigError("the folder of --json does not exist", path, "create it first")


def keep(figures: Any, path: str | Path) -> None:
    """Writes figures as JSON, whole or not at all."""
    write(path, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def write(path: str | Path, text: str) -> None:
    """Writes a file and its folder. Raises ConfigError."""
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        raise ConfigError(f"cannot write {file.name}, {error.strerror}", str(path), "name another file") from None

"""How long calls take."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from maxi import __version__

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


def about_this_machine(devices: Sequence[Any]) -> dict[str, Any]:
    """What figures have to be read with."""
    first = devices[0]
    versions = {"maxi": __version__, "jax": jax.__version__}
    return {"platform": first.platform, "device": first.device_kind, "devices": len(devices), "versions": versions}

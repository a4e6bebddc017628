"""Samples into rows of equal length with as little padding as can be had cheaply.

A row begins with the longest sample that is left and takes the longest that fits, until one sample, or two, fill it to the
last token. Best fit alone stops at the longest that fits, and where all samples are of a size (GSM8K's at 1024) leaves 2.2 %
empty, this 0.9 %. The plan depends on the lengths alone, so every host makes the same.
"""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row summing to `capacity` at most; of equal lengths the first goes first.

    Every length must lie in [1, capacity]. About 6 us a sample at 1024 after the sort.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity), (lengths, capacity)
    order = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    following = np.cumsum(counts) - counts
    there = counts > 0

    def take(length: int) -> int:
        index = order[following[length]]
        following[length] += 1
        counts[length] -= 1
        there[length] = counts[length] > 0
        return int(index)

    rows: list[list[int]] = []
    longest, left = capacity, len(lengths)
    while left:
        while not there[longest]:
            longest -= 1
        row, room = [take(longest)], capacity - longest
        while room and (sizes := _next(there, counts, room)):
            row += map(take, sizes)
            room -= sum(sizes)
        rows.append(row)
        left -= len(row)
    return rows


def _next(there: np.ndarray, counts: np.ndarray, room: int) -> tuple[int, ...]:
    """The lengths to take next: what fills the room, else the longest that fits, else nothing."""
    if there[room]:
        return (room,)
    half = room // 2
    # lengths room - half ... room - 1 whose counterpart half ... 1 is there too
    longer = np.flatnonzero(there[room - half : room] & there[half:0:-1])
    for offset in longer[:-3:-1].tolist():
        first = room - half + offset
        if first != room - first or counts[first] > 1:
            return first, room - first
    fitting = np.flatnonzero(there[1:room])
    return (int(fitting[-1]) + 1,) if len(fitting) else ()

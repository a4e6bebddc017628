"""Which batch a step reads when some batches are left out for ever.

Batches are numbered from 0 in the order of the endless stream; step n (from 0) reads the n-th that is not left out.
"""

from collections.abc import Iterator, Sequence

Skips = tuple[tuple[int, int], ...]
"""(first, how many) of each stretch that is left out; they may overlap and come in any order."""


def batch_of(step: int, skips: Sequence[tuple[int, int]]) -> int:
    """The number of the batch that step `step` (from 0) reads."""
    number = step
    for first, stop in _merged(skips):
        if first > number:
            break
        number += stop - first
    return number


def stretches(step: int, skips: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int | None]]:
    """[first, stop) of the batches that are read from step `step` on; the last stop is None, for no end."""
    at = batch_of(step, skips)
    for first, stop in _merged(skips):
        if first >= at:
            if first > at:
                yield at, first
            at = stop
    yield at, None


def skipping(step: int, count: int, skips: Skips) -> Skips:
    """`skips` and, behind them, the next `count` batches from step `step` on."""
    more = []
    for first, stop in stretches(step, skips):
        taken = count if stop is None else min(count, stop - first)
        if taken:
            more.append((first, taken))
        count -= taken
        if not count:
            break
    return (*skips, *more)


def _merged(skips: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """[first, stop) without overlaps, ascending."""
    merged: list[tuple[int, int]] = []
    for first, count in sorted(skips):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], first + count)
        else:
            merged.append((first, first + count))
    return merged

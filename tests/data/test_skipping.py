"""Batches that are left out: by hand, and that any way of asking says the same."""

from itertools import islice

import numpy as np
import pytest

from maxi.data.skipping import batch_of, skipping, stretches

CASES = [(), ((0, 1),), ((3, 2),), ((3, 2), (5, 1)), ((7, 3), (2, 2), (8, 4)), ((0, 4), (1, 1), (20, 5))]


@pytest.mark.parametrize("skips", CASES, ids=str)
def test_step_n_reads_the_nth_batch_that_is_left(skips: tuple[tuple[int, int], ...]) -> None:
    out = {number for first, count in skips for number in range(first, first + count)}
    left = [number for number in range(60) if number not in out]
    assert [batch_of(step, skips) for step in range(30)] == left[:30]
    for start in range(12):
        read = (n for first, stop in stretches(start, skips) for n in range(first, stop if stop is not None else 60))
        assert list(islice(read, 10)) == left[start : start + 10]


def test_skipping_more_leaves_out_what_would_have_come_next() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        skips = tuple((int(a), int(b)) for a, b in zip(rng.integers(0, 20, 3), rng.integers(1, 5, 3), strict=True))
        step, count = int(rng.integers(0, 15)), int(rng.integers(1, 8))
        before = [batch_of(n, skips) for n in range(40)]
        after = [batch_of(n, skipping(step, count, skips)) for n in range(40 - count)]
        assert after == before[:step] + before[step + count :]
    assert skipping(3, 0, ()) == ()

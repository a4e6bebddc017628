"""Packing: every sample once, no row over its length, and rows as full as the kinds of data allow."""

import numpy as np
import pytest

from maxi.data.packing import best_fit


@pytest.mark.parametrize("seed", range(8))
def test_every_sample_once_and_no_row_too_long(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, rng.integers(1, 400))
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(int(lengths[row].sum()) for row in rows) <= 64


def test_a_row_is_filled_by_one_or_two_where_that_can_be() -> None:
    assert best_fit([60, 50, 14, 4], 64) == [[0, 3], [1, 2]]
    assert best_fit([50, 13, 10, 4, 3], 64) == [[0, 2, 3], [1, 4]]  # the longest that fits would leave a gap of 1
    assert best_fit([30, 17, 17, 16], 64) == [[0, 1, 2], [3]]  # two of one length


def test_equal_lengths_keep_their_order_and_edges_hold() -> None:
    assert best_fit([2] * 5, 4) == [[0, 1], [2, 3], [4]]
    assert best_fit([], 8) == [] and best_fit([8, 8], 8) == [[0], [1]] and best_fit([7, 1], 8) == [[0, 1]]
    with pytest.raises(AssertionError):
        best_fit([9], 8)


@pytest.mark.parametrize(
    ("lengths", "full"),
    [
        (np.clip(np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int), 2, 1024), 0.999),
        (np.random.default_rng(0).integers(100, 600, 20_000), 0.995),  # no short ones to fill gaps: best fit has 0.993
    ],
)
def test_lengths_as_in_chat_leave_hardly_any_room(lengths: np.ndarray, full: float) -> None:
    assert lengths.sum() / (1024 * len(best_fit(lengths, 1024))) > full

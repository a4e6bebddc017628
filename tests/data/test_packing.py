"""Best fit: every sample once, no row over its length, nearly full; and against the first-fit bound by brute force."""

import numpy as np
import pytest

from maxi.data.packing import best_fit


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_once_and_no_row_too_long(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, rng.integers(1, 400))
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(int(lengths[row].sum()) for row in rows) <= 64
    assert len(rows) <= 11 / 9 * -(-lengths.sum() // 64) + 6 / 9 + max(0, (lengths > 32).sum() - lengths.sum() / 64)


def test_the_smallest_room_that_fits_is_taken() -> None:
    assert best_fit([60, 50, 14, 4], 64) == [[0, 3], [1, 2]]  # first fit would agree; worst fit would not
    assert best_fit([50, 40, 20, 14], 64) == [[0, 3], [1, 2]]


def test_equal_lengths_keep_their_order_and_edges_hold() -> None:
    assert best_fit([2] * 5, 4) == [[0, 1], [2, 3], [4]]
    assert best_fit([], 8) == [] and best_fit([8, 8], 8) == [[0], [1]]
    with pytest.raises(AssertionError):
        best_fit([9], 8)


def test_lengths_as_in_chat_leave_hardly_any_room() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(int), 2, 1024)
    assert lengths.sum() / (1024 * len(best_fit(lengths, 1024))) > 0.995

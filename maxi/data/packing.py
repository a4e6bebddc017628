"""Samples into rows of equal length with as little padding as can be had cheaply: best fit, longest first.

Best-fit decreasing needs at most 11/9 of the optimum's rows (Johnson, 1973), and on chat data, where short samples fill
what long ones leave, it is within a row or two of full. The plan depends on the lengths alone, so every host makes the same.
"""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row summing to `capacity` at most; equal lengths keep their order.

    Every length must lie in [1, capacity]. n log n for the sort and near-constant work a sample after it.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity), (lengths, capacity)
    rows: list[list[int]] = []
    # with_room[r]: rows that have exactly r left; `rooms` has bit r set where that list is not empty, so that the
    # smallest room of at least n is one shift and one lowest set bit away, whatever the number of rows
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[index])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        with_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows

"""Every token of every document is in a window once, and every window in a row once."""

import numpy as np
import pytest

from maxi.data import windows
from maxi.data.windows import cut, packed


@pytest.mark.parametrize(("ids", "sizes"), [(1, []), (2, [2]), (9, [9]), (10, [9, 2]), (17, [9, 9]), (18, [9, 9, 2])])
def test_windows_overlap_by_the_token_that_both_need(ids: int, sizes: list[int]) -> None:
    """The last target of one is the first input of the next."""
    found = [part.tolist() for _, part in cut(5, np.arange(ids), 8)]
    assert [len(part) for part in found] == sizes
    assert [target for part in found for target in part[1:]] == list(range(1, ids))


@pytest.mark.parametrize("pool", [1, 3, 64])
def test_every_window_is_packed_once(pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "POOL_ROWS", pool)
    rng = np.random.default_rng(0)
    made = [(n, rng.integers(0, 99, rng.integers(2, 34)).astype(np.int32)) for n in range(200)]
    batches = list(packed(iter(made), 32, 4))
    assert {batch["tokens"].shape for batch in batches[:-1]} == {(4, 32)}
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][row].max() + 1):
                at = np.flatnonzero(batch["segments"][row] == segment)
                assert (np.diff(at) == 1).all()
                assert (batch["positions"][row, at] == np.arange(len(at))).all()
                ids = np.append(batch["tokens"][row, at], batch["targets"][row, at[-1]])
                assert (batch["targets"][row, at] == ids[1:]).all()
                (document,) = set(batch["documents"][row, at].tolist())
                found.append((document, ids.tolist()))
    assert sorted(found) == [(n, ids.tolist()) for n, ids in made]
    real = sum((batch["segments"] > 0).sum() for batch in batches)
    assert pool < 64 or real / sum(batch["segments"].size for batch in batches) > 0.95

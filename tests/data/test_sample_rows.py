"""Rows of samples and of pairs: what stands where, against the words of the module, and what packing may not change."""

from typing import Any

import numpy as np
import pytest

from maxi.data.cache import TokenCache
from maxi.data.sample_rows import PairRows, SampleRows


def cache_of(items: list[list[list[int]]], labels: list[int] | None = None) -> TokenCache:
    """Items of parts of ids; every id counts as a target with weight 1 + id / 100, those of a pair's prompt with none."""
    parts = [part for item in items for part in item]
    tokens = np.array([i for part in parts for i in part], np.uint16)
    silent = [len(items[0]) > 1 and n % len(items[0]) == 0 for n in range(len(parts))]
    weights = np.concatenate(
        [np.array(p, np.float32) * 0 if s else 1 + np.array(p) / 100 for p, s in zip(parts, silent, strict=True)]
    )
    marks = None if labels is None else np.array(labels, np.uint8)
    return TokenCache(tokens, np.cumsum([len(p) for p in parts]), weights.astype(np.float32), marks, {}, "", True)


def random_items(parts: int, count: int, seed: int = 0) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [[rng.integers(1, 90, rng.integers(2, 7)).tolist() for _ in range(parts)] for _ in range(count)]


def segments(row: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The row taken apart again, a dict of its keys for each segment."""
    keys = [key for key in row if row[key].shape == row["tokens"].shape]
    return [{key: row[key][row["segments"] == n].tolist() for key in keys} for n in range(1, row["segments"].max() + 1)]


@pytest.mark.parametrize("pack", [True, False])
def test_samples_stand_whole_with_targets_one_on(pack: bool) -> None:
    items = random_items(1, 40)
    rows = SampleRows(cache_of(items), 16, pack=pack)
    found = []
    for number in range(len(rows)):
        row = rows[number]
        assert all(len(value) == 16 for value in row.values())
        assert (row["loss_weight"][row["segments"] == 0] == 0).all()
        for part in segments(row):
            assert part["positions"] == list(range(len(part["tokens"])))
            np.testing.assert_allclose(part["loss_weight"], 1 + np.array(part["targets"]) / 100)
            found.append([part["tokens"][0], *part["targets"]])
            assert part["tokens"][1:] == part["targets"][:-1]
    assert sorted(found) == sorted(item[0] for item in items)
    assert rows.real_tokens == sum(len(item[0]) - 1 for item in items)
    assert len(rows) == 40 if not pack else rows.real_tokens / (16 * len(rows)) > 0.9
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_pair_shares_its_prompt() -> None:
    rows = PairRows(cache_of([[[1, 2, 3], [4, 5], [6]]]), 8)
    rows.reference = np.array([[-1.5, -2.5]], np.float32)
    row = rows[0]
    assert rows.width == 16 and rows.real_tokens == 5
    prompt, first, second = segments(row)
    assert prompt["tokens"] == [1, 2] and prompt["loss_weight"] == [0, 0] and prompt["branches"] == [0, 0]
    assert (first["tokens"], first["targets"], first["positions"]) == ([3, 4], [4, 5], [2, 3])
    assert (second["tokens"], second["targets"], second["positions"]) == ([3], [6], [2])
    assert first["contexts"] == [1, 1] and second["contexts"] == [1]
    assert first["branches"] == [1, 1] and second["branches"] == [2]
    assert (row["pair_weight"].tolist(), row["ref_first"].tolist(), row["ref_second"].tolist()) == ([1], [-1.5], [-2.5])


def test_two_copies_hold_the_same_answers() -> None:
    row = PairRows(cache_of([[[1, 2, 3], [4, 5], [6]]]), 8, share_prompt=False)[0]
    first, second = segments(row)
    assert (first["tokens"], first["targets"], first["contexts"]) == ([1, 2, 3, 4], [2, 3, 4, 5], [0] * 4)
    assert (second["tokens"], second["targets"], second["positions"]) == ([1, 2, 3], [2, 3, 6], [0, 1, 2])
    np.testing.assert_allclose(second["loss_weight"], [0, 0, 1.06])


def test_a_prompt_of_one_token_needs_no_segment() -> None:
    first, second = segments(PairRows(cache_of([[[1], [4, 5], [6]]]), 4)[0])
    assert first["tokens"] == [1, 4] and first["contexts"] == [0, 0] and second["positions"] == [0]


def test_pairs_of_a_row_are_numbered_and_any_pair_fits() -> None:
    rows = PairRows(cache_of(random_items(3, 30)), 13)  # the longest prompt and answer: 6 + 6 ids
    rows.pairs = rows.most_items + 2
    seen = []
    for number in range(len(rows)):
        row, items = rows[number], rows.items(number)
        assert row["pair_weight"].tolist() == [1] * len(items) + [0] * (rows.pairs - len(items))
        assert set(row["branches"]) - {0} == set(range(1, 2 * len(items) + 1))
        seen += items.tolist()
    assert sorted(seen) == list(range(30))


def test_labels_bring_the_answer_of_the_row_before() -> None:
    rows = PairRows(cache_of([[[1, 2], [3, 4, 5]], [[6, 7, 8], [9]]], labels=[1, 0]), 4, pack=False)
    first, second = rows[0], rows[1]
    assert first["labels"].tolist() == [1] and second["labels"].tolist() == [0]
    assert [part["targets"] for part in segments(first)][1:] == [[3, 4, 5], [9]]
    assert [part["targets"] for part in segments(second)][1:] == [[9], [3, 4]]  # cut: prompt and answer are at most 5 ids


def test_blank_rows_have_every_key_and_count_for_nothing() -> None:
    rows = PairRows(cache_of(random_items(2, 3), labels=[1, 0, 1]), 13)
    blank, row = rows.blank(), rows[0]
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in row.items()}
    assert not any(value.any() for value in blank.values())

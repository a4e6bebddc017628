"""Packed rows against a slow definition, one token at a time."""

import random

import numpy as np
import pytest

from maxi.data.rows import PackedRows

EOS = 99


def stream(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of 1 to 98 counting tokens, the last of each EOS."""
    tokens = [t for length in lengths for t in [*(1 + i % 98 for i in range(length - 1)), EOS]]
    return np.array(tokens, np.uint16), np.cumsum(lengths)


def slow_rows(tokens: np.ndarray, ends: np.ndarray, T: int, across: bool, partial: bool) -> list[dict[str, list]]:
    owner = [d for d, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) for _ in range(a, b)]
    rows = []
    for start in range(0, len(tokens), T):
        if start + T > len(tokens) and not partial:
            break
        row: dict[str, list] = {name: [0] * T for name in ("tokens", "targets", "positions", "segments", "loss_weight")}
        for i, p in enumerate(range(start, min(start + T, len(tokens)))):
            same_as_before = i > 0 and (across or owner[p] == owner[p - 1])
            row["tokens"][i] = int(tokens[p])
            row["segments"][i] = 1 if i == 0 else row["segments"][i - 1] + (not same_as_before)
            row["positions"][i] = row["positions"][i - 1] + 1 if same_as_before else 0
            if p + 1 < len(tokens) and (across or owner[p + 1] == owner[p]):
                row["targets"][i], row["loss_weight"][i] = int(tokens[p + 1]), 1.0
        rows.append(row)
    return rows


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_rows_are_their_definition(across: bool, partial: bool) -> None:
    pick = random.Random(0)
    for trial in range(60):
        lengths = [pick.choice([1, 1, 2, 3, 7, 8, 16, 40]) for _ in range(pick.randrange(1, 12))]
        T = pick.choice([1, 2, 4, 8, 16])
        tokens, ends = stream(lengths)
        rows = PackedRows(tokens, ends, T, across_documents=across, keep_partial=partial)
        expected = slow_rows(tokens, ends, T, across, partial)
        assert len(rows) == len(expected)
        for index, row in enumerate(expected):
            got = rows[index]
            assert set(got) == set(row)
            for name, values in row.items():
                assert got[name].dtype == (np.float32 if name == "loss_weight" else np.int32)
                assert got[name].tolist() == values, (trial, lengths, T, index, name)


def test_every_token_but_the_first_of_a_document_is_a_target_once() -> None:
    tokens, ends = stream([5, 1, 30, 2, 2, 9])
    rows = PackedRows(tokens, ends, 8, keep_partial=True)
    assert sum(rows[i]["loss_weight"].sum() for i in range(len(rows))) == len(tokens) - len(ends)


def test_rows_end() -> None:
    rows = PackedRows(*stream([20]), 8)
    assert len(rows) == 2
    for index in (2, -1):
        with pytest.raises(IndexError):
            rows[index]

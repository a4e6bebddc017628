"""Scores of repetition against counts by hand and by brute force."""

import random
import time

import pytest

from maxi.scores import distinct, longest_loop, score, summary


def loop_by_trying(ids: list[int]) -> int:
    """Every block at every place, copied for as long as it goes on."""
    longest = 0
    for start in range(len(ids)):
        for period in range(1, len(ids) - start):
            block, copies = ids[start : start + period], 1
            while ids[start + copies * period : start + (copies + 1) * period] == block:
                copies += 1
            longest = max(longest, copies * period if copies > 1 else 0)
    return longest


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *(("abcabcabc", 9), ("xabcabcabcab", 9), ("abcd", 0), ("abca", 0), ("aa", 2), ("a", 0), ("", 0)),
        *(("xxabab", 4), ("aaabcdbcd", 6), ("abaabaab", 6), ("aaaaa", 5), ("abcabdabcabd", 12)),
    ],
)
def test_longest_loop_by_hand(text: str, tokens: int) -> None:
    assert longest_loop([ord(letter) for letter in text]) == tokens


def test_longest_loop_by_brute_force() -> None:
    pick = random.Random(0)
    for _ in range(400):
        ids = [pick.randrange(pick.choice((2, 3))) for _ in range(pick.randrange(30))]
        assert longest_loop(ids) == loop_by_trying(ids), ids


def test_a_long_generation_takes_no_time() -> None:
    ids = [number * number % 9973 for number in range(2048)]
    begun = time.perf_counter()
    longest_loop(ids)
    assert time.perf_counter() - begun < 1


def test_ngrams_by_hand() -> None:
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 5]  # 6 4-grams, of which 1 2 3 4 stands twice; 8 pairs, three of them twice
    assert score(ids, True) == {
        "repeated_4grams": pytest.approx(1 / 6),
        "distinct_1": pytest.approx(5 / 9),
        "distinct_2": pytest.approx(5 / 8),
        "longest_loop": 8.0,
        "stopped": 1.0,
    }
    assert distinct([7] * 50, 4) == pytest.approx(1 / 47)


@pytest.mark.parametrize("ids", [[], [3], [3, 3, 3]])
def test_too_short_to_repeat(ids: list[int]) -> None:
    assert score(ids, False)["repeated_4grams"] == 0.0


def test_nothing_repeats_nothing() -> None:
    assert list(score([], True).values()) == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_a_summary_is_the_mean() -> None:
    found = summary([([1, 1, 1, 1, 1], False), ([1, 2, 3, 4, 5], True), ([], True), ([9, 9], True)])
    assert found["stopped"] == 0.75
    assert found["repeated_4grams"] == pytest.approx(0.5 / 4)
    assert found["longest_loop"] == pytest.approx((5 + 2) / 4)
    assert found["distinct_1"] == pytest.approx((0.2 + 1 + 1 + 0.5) / 4)
    assert summary([]) == {}

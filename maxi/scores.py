"""How much a generation repeats itself, and whether it ends: the first things that go wrong in a model that talks.

A generation is a list of token ids, without its prompt and without the token that ended it; what the ids mean is not
known here. Every score is a number per generation, and a summary is the mean of each.

    repeated_4grams   share of its 4-grams that were there before: 1 - distinct / all (seq-rep-4 of Welleck et al.,
                      arXiv:1908.04319); 0 for fewer than 4 tokens
    distinct_1        distinct tokens / all (distinct-n of Li et al., arXiv:1510.03055); 1 when there is none
    distinct_2        distinct pairs of neighbours / all; 1 for fewer than 2 tokens
    longest_loop      the most tokens that one block covers by standing at least twice in a row, whole copies only
                      (`abcabcabc` and `xabcabcabcab` 9, `abcd` 0)
    stopped           1 if it ended by itself, 0 if the length limit cut it off
"""

from collections.abc import Iterable, Sequence

import numpy as np


def distinct(ids: Sequence[int], n: int) -> float:
    """Distinct n-grams / all n-grams of `ids`; 1 (nothing is repeated) when there is none."""
    grams = len(ids) - n + 1
    return len({tuple(ids[first : first + n]) for first in range(grams)}) / grams if grams > 0 else 1.0


def longest_loop(ids: Sequence[int]) -> int:
    """The largest k * p such that somewhere in `ids` a block of p tokens stands k >= 2 times in a row; 0 if none does.

    A block stands k times in a row where (k - 1) * p neighbours in place equal the token p before them. Time is
    quadratic, about 5 ms for 500 tokens and 20 ms for 2,000.
    """
    ids_T = np.asarray(ids, np.int64)
    longest = 0
    for period in range(1, len(ids_T) // 2 + 1):
        unequal = np.flatnonzero(ids_T[period:] != ids_T[:-period])
        stretch = int(np.diff(unequal, prepend=-1, append=len(ids_T) - period).max()) - 1
        if stretch >= period:
            longest = max(longest, (stretch // period + 1) * period)
    return longest


def score(ids: Sequence[int], stopped: bool) -> dict[str, float]:
    """The scores of one generation, as the module describes them."""
    return {
        "repeated_4grams": 1.0 - distinct(ids, 4),
        "distinct_1": distinct(ids, 1),
        "distinct_2": distinct(ids, 2),
        "longest_loop": float(longest_loop(ids)),
        "stopped": float(stopped),
    }


def summary(generations: Iterable[tuple[Sequence[int], bool]]) -> dict[str, float]:
    """The mean of each score over (ids, stopped) of several generations; empty when there are none."""
    scored = [score(ids, stopped) for ids, stopped in generations]
    return {name: float(np.mean([scores[name] for scores in scored])) for name in (scored[0] if scored else ())}

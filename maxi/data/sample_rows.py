"""Conversations and pairs as rows of equal length: whole samples, best fit, each with attention and positions of its own.

A sample of n ids takes n - 1 places: its last id is only a target. A pair with a shared prompt is three segments: the
prompt without its last token, then one branch an answer, which begins with that last token (its target is the answer's
first token, so there must be one in each branch). The branches' context is the prompt's segment and their positions go
on from it, so each answer sees what it would see in a copy of its own.
"""

from typing import Any

import numpy as np

from maxi.data.cache import TokenCache
from maxi.data.packing import best_fit
from maxi.data.rows import Row, blank_row


class _Planned:
    """Which items stand in which row; `sizes` int [items] are the places each takes."""

    def __init__(self, sizes: np.ndarray, width: int, pack: bool):
        self.width, self.sizes = width, sizes
        plan = best_fit(sizes, width) if pack else [[item] for item in range(len(sizes))]
        self._items = np.fromiter((item for row in plan for item in row), np.int32, len(sizes))
        self._stops = np.cumsum([0, *map(len, plan)])

    def __len__(self) -> int:
        return len(self._stops) - 1

    def items(self, index: int) -> np.ndarray:
        """The numbers of the items in row `index`, in their order there."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._items[self._stops[index] : self._stops[index + 1]]

    @property
    def real_tokens(self) -> int:
        return int(self.sizes.sum())

    @property
    def most_items(self) -> int:
        """Of all rows, the largest number of items in one."""
        return int(np.diff(self._stops).max(initial=1))


class SampleRows(_Planned):
    """One segment a sample; see `maxi.data.rows.Rows`. `pack` False: one sample a row."""

    def __init__(self, cache: TokenCache, seq_len: int, *, pack: bool = True):
        assert cache.weights is not None
        self._tokens, self._weights = cache.tokens, cache.weights
        self._bounds = np.concatenate(([0], cache.ends))
        super().__init__(np.diff(self._bounds) - 1, seq_len, pack)
        self.layout: Any = {"pack": pack}

    def __getitem__(self, index: int) -> Row:
        row, at = self.blank(), 0
        for segment, item in enumerate(self.items(index), 1):
            start, stop = self._bounds[item : item + 2]
            ids, here = self._tokens[start:stop], slice(at, at + int(stop - start) - 1)
            row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
            row["positions"][here] = np.arange(len(ids) - 1)
            row["segments"][here] = segment
            row["loss_weight"][here] = self._weights[start + 1 : stop]
            at = here.stop
        return row

    def blank(self) -> Row:
        return blank_row(self.width)


class PairRows(_Planned):
    """Two branches an item, one after a prompt; see `maxi.data.rows.Rows` and the batch keys in `maxi.objectives`.

    Items are three parts in the cache: the prompt's ids (at least one) and both answers'. With `labels` an item has two
    parts, prompt and answer, and the second branch is the answer of the item before it to this one's prompt, cut where
    it would be over `seq_len`, which estimates how far the policy has moved (KTO, arXiv:2402.01306, section 4.1).
    `reference` may be set to float32 [items, 2]; `pairs` to the number of pairs that rows make room for.
    """

    def __init__(self, cache: TokenCache, seq_len: int, *, pack: bool = True, share_prompt: bool = True):
        assert cache.weights is not None
        self._tokens, self._weights, self._labels = cache.tokens, cache.weights, cache.labels
        self._share, self._longest = share_prompt, seq_len + 1
        parts = 3 if cache.labels is None else 2
        bounds = np.concatenate(([0], cache.ends))
        self._starts, self._stops_of = bounds[:-1].reshape(-1, parts), bounds[1:].reshape(-1, parts)
        prompt, first, second = self._lengths()
        sizes = prompt - 1 + first + second if share_prompt else 2 * (prompt - 1) + first + second
        # twice: a pair of answers, each of which fits seq_len with its prompt, fits a row
        super().__init__(sizes, 2 * seq_len, pack)
        self.layout: Any = {"pack": pack, "share_prompt": share_prompt}
        self.reference: np.ndarray | None = None
        self.pairs = self.most_items

    def _lengths(self) -> np.ndarray:
        """int64 [3, items]: ids of the prompt and of both branches."""
        lengths = (self._stops_of - self._starts).T
        if self._labels is None:
            return lengths
        prompt, answer = lengths
        return np.stack([prompt, answer, np.minimum(np.roll(answer, 1), self._longest - prompt)])

    def _parts(self, item: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and weights of prompt, first and second branch."""
        of = [(item, 0), (item, 1), (item, 2) if self._labels is None else (item - 1, 1)]
        spans = [slice(int(self._starts[i, part]), int(self._stops_of[i, part])) for i, part in of]
        parts = [(self._tokens[span].astype(np.int32), self._weights[span]) for span in spans]
        room = self._longest - len(parts[0][0])
        return [parts[0], *((ids[:room], weights[:room]) for ids, weights in parts[1:])]

    def __getitem__(self, index: int) -> Row:
        row = self.blank()
        at = segment = 0

        def put(ids: np.ndarray, targets: np.ndarray, weights: np.ndarray, first: int, context: int, branch: int) -> None:
            nonlocal at, segment
            segment += 1
            here = slice(at, at + len(ids))
            row["tokens"][here], row["targets"][here], row["loss_weight"][here] = ids, targets, weights
            row["positions"][here] = np.arange(first, first + len(ids))
            row["segments"][here], row["contexts"][here], row["branches"][here] = segment, context, branch
            at = here.stop

        for pair, item in enumerate(self.items(index).tolist()):
            (prompt, _), *answers = self._parts(item)
            before, last = prompt[:-1], prompt[-1:]
            context = 0
            if self._share and len(before):
                put(before, np.zeros_like(before), np.zeros(len(before), np.float32), 0, 0, 0)
                context = segment
            for number, (ids, weights) in enumerate(answers, 1):
                if self._share:
                    put(np.append(last, ids[:-1]), ids, weights, len(before), context, 2 * pair + number)
                else:
                    whole, silent = np.append(prompt, ids), np.zeros(len(before), np.float32)
                    put(whole[:-1], whole[1:], np.append(silent, weights), 0, 0, 2 * pair + number)
            row["pair_weight"][pair] = 1
            if self.reference is not None:
                row["ref_first"][pair], row["ref_second"][pair] = self.reference[item]
            if self._labels is not None:
                row["labels"][pair] = self._labels[item]
        return row

    def blank(self) -> Row:
        row = blank_row(self.width)
        row |= {name: np.zeros(self.width, np.int32) for name in ("contexts", "branches")}
        names = ["pair_weight", "ref_first", "ref_second"] + ["labels"] * (self._labels is not None)
        return row | {name: np.zeros(self.pairs, np.float32) for name in names}

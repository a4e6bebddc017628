"""Conversations and pairs as rows of equal length: whole samples, best fit, each with attention and positions of its own.

A sample of n ids takes n - 1 places: its last id is only a target. A pair with a shared prompt is three segments: the
prompt without its last token, then one branch an answer, which begins with that last token (its target is the answer's
first token, so there must be one in each branch). The branches' context is the prompt's segment and their positions go
on from it, so each answer sees what it would see in a copy of its own.

For a model with `virtual` tokens as many places are left free at the beginning of every document, at its positions 0 to
virtual - 1: token 0, no target, no weight. A shared prompt has them once.
"""

from typing import Any

import numpy as np

from maxi.data.cache import TokenCache
from maxi.data.packing import best_fit
from maxi.data.rows import Row, blank_row


class _Planned:
    """Which items stand in which row; `sizes` int [items] are the places each takes, `free` of them by no token."""

    def __init__(self, sizes: np.ndarray, width: int, pack: bool, free: int):
        self.width, self.sizes, self._free = width, sizes, free
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
        return int(self.sizes.sum()) - self._free * len(self.sizes)

    @property
    def most_items(self) -> int:
        """Of all rows, the largest number of items in one."""
        return int(np.diff(self._stops).max(initial=1))


def _layout(virtual: int, **more: Any) -> Any:
    return {**more, "virtual": virtual} if virtual else more


class SampleRows(_Planned):
    """One segment a sample; see `maxi.data.rows.Rows`. `pack` False: one sample a row.

    Of a cache without weights every token is learned, and a document longer than a row stands in several, each with a
    beginning of its own: how documents are read by a model with virtual tokens.
    """

    def __init__(self, cache: TokenCache, seq_len: int, *, pack: bool = True, virtual: int = 0):
        self._tokens, self._weights, self.virtual = cache.tokens, cache.weights, virtual
        bounds = np.concatenate(([0], cache.ends))
        self._starts, self._stops_of = bounds[:-1], bounds[1:]
        if cache.weights is None:
            self._starts, self._stops_of = _windows(self._starts, self._stops_of, seq_len - virtual)
        super().__init__(self._stops_of - self._starts - 1 + virtual, seq_len, pack, virtual)
        self.layout: Any = _layout(virtual, pack=pack)

    def __getitem__(self, index: int) -> Row:
        row, begin = self.blank(), 0
        for segment, item in enumerate(self.items(index), 1):
            start, stop = int(self._starts[item]), int(self._stops_of[item])
            ids, here = self._tokens[start:stop], slice(begin + self.virtual, begin + self.virtual + stop - start - 1)
            row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
            row["positions"][begin : here.stop] = np.arange(here.stop - begin)
            row["segments"][begin : here.stop] = segment
            row["loss_weight"][here] = 1 if self._weights is None else self._weights[start + 1 : stop]
            begin = here.stop
        return row

    def blank(self) -> Row:
        return blank_row(self.width)


def _windows(starts: np.ndarray, stops: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Where windows of at most `longest` inputs begin and end, one after the other in each document; the last id of one is
    the first of the next, so that every token but a document's first is predicted once."""
    counts = np.maximum(-(-(stops - starts - 1) // longest), 0)
    of = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[of] + number * longest
    return begins, np.minimum(begins + longest + 1, stops[of])


class PairRows(_Planned):
    """Two branches an item, one after a prompt; see `maxi.data.rows.Rows` and the batch keys in `maxi.objectives`.

    Items are three parts in the cache: the prompt's ids (at least one) and both answers'. With `labels` an item has two
    parts, prompt and answer, and the second branch is the answer of the item before it to this one's prompt, cut where
    it would be over `seq_len`, which estimates how far the policy has moved (KTO, arXiv:2402.01306, section 4.1).
    `reference` may be set to float32 [items, 2]; `pairs` to the number of pairs that rows make room for.
    """

    def __init__(self, cache: TokenCache, seq_len: int, *, pack: bool = True, share_prompt: bool = True, virtual: int = 0):
        assert cache.weights is not None
        self._tokens, self._weights, self._labels = cache.tokens, cache.weights, cache.labels
        self._share, self._longest, self.virtual = share_prompt, seq_len - virtual + 1, virtual
        parts = 3 if cache.labels is None else 2
        bounds = np.concatenate(([0], cache.ends))
        self._starts, self._stops_of = bounds[:-1].reshape(-1, parts), bounds[1:].reshape(-1, parts)
        prompt, first, second = self._lengths()
        sizes = prompt - 1 + first + second if share_prompt else 2 * (prompt - 1) + first + second
        # twice: a pair of answers, each of which fits seq_len with its prompt, fits a row
        free = virtual if share_prompt else 2 * virtual
        super().__init__(sizes + free, 2 * seq_len, pack, free)
        self.layout: Any = _layout(virtual, pack=pack, share_prompt=share_prompt)
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

        def put(ids: np.ndarray, targets: np.ndarray, weights: np.ndarray, context: int, first: int, branch: int) -> None:
            """`first`: the position that follows the context's last."""
            nonlocal at, segment
            segment += 1
            begin, at = at, at + (0 if context else self.virtual)
            here = slice(at, at + len(ids))
            row["tokens"][here], row["targets"][here], row["loss_weight"][here] = ids, targets, weights
            row["positions"][begin : here.stop] = np.arange(first, first + here.stop - begin)
            row["segments"][begin : here.stop], row["contexts"][begin : here.stop] = segment, context
            row["branches"][here] = branch
            at = here.stop

        for pair, item in enumerate(self.items(index).tolist()):
            (prompt, _), *answers = self._parts(item)
            before, last = prompt[:-1], prompt[-1:]
            context = first = 0
            if self._share and self.virtual + len(before):
                put(before, np.zeros_like(before), np.zeros(len(before), np.float32), 0, 0, 0)
                context, first = segment, self.virtual + len(before)
            for number, (ids, weights) in enumerate(answers, 1):
                if self._share:
                    put(np.append(last, ids[:-1]), ids, weights, context, first, 2 * pair + number)
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

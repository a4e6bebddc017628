"""Documents in windows, and windows in rows: what an evaluation reads, where every token's document must be known.

A window is at most `seq_len` inputs and, one on, their targets, so `seq_len + 1` ids; the next one begins with its last
id. Windows are packed whole, so a row may hold many. Training reads `rows.py` instead, by random access, or beside virtual
tokens `sample_rows.py`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from maxi.data.documents import Budget, Document, read
from maxi.data.packing import best_fit
from maxi.sections import Source

if TYPE_CHECKING:
    from maxi.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
Window = tuple[int, np.ndarray]
"""The number of its document, and its ids."""

ENCODE_AT_ONCE = 256
"""Documents tokenised together."""
POOL_ROWS = 64
"""Rows' worth of windows from which rows are packed: more leaves fewer gaps and holds more documents in memory."""
WIDTH_STEP = 256
"""The last batch is no wider than it must be, in multiples of this."""


def encoded(tokenizer: "Tokenizer", paths: Sequence[str], field: str) -> Iterator[tuple[str, np.ndarray]]:
    """(where it is, int32 ids and the end-of-sequence token) of every document of `paths`, each as data.train takes it.

    Raises DataError for what cannot be read.
    """
    group: list[Document] = []
    for path in paths:
        for document in read(Source(path=path, field=field), Budget()):
            group.append(document)
            if len(group) == ENCODE_AT_ONCE:
                yield from _encoded(tokenizer, group)
                group = []
    yield from _encoded(tokenizer, group)


def _encoded(tokenizer: "Tokenizer", group: list[Document]) -> Iterator[tuple[str, np.ndarray]]:
    ids = tokenizer.encode([document.text for document in group])
    for document, text_ids in zip(group, ids, strict=True):
        yield document.where, np.append(text_ids, np.int32(tokenizer.eos_id))


def cut(document: int, ids: np.ndarray, seq_len: int) -> Iterator[Window]:
    """A document's windows, in order; none for a single id, which nothing predicts."""
    for first in range(0, len(ids) - 1, seq_len):
        yield document, ids[first : first + seq_len + 1]


def packed(windows: Iterable[Window], seq_len: int, batch_size: int, virtual: int = 0) -> Iterator[Batch]:
    """Batches [batch_size, seq_len] of whole windows, in an order of its own, `virtual` places free before each.

    Beside tokens, targets, positions and segments there is `documents`: the number of each token's, -1 for padding.
    All batches have one shape but the last, which is no larger than it must be.
    """
    pool: list[Window] = []
    held = 0
    for window in windows:
        pool.append(window)
        held += _size(window, virtual)
        if held >= max(POOL_ROWS, 2 * batch_size) * seq_len:
            rows = _rows(pool, seq_len, virtual)
            whole = len(rows) // batch_size * batch_size
            for first in range(0, whole, batch_size):
                yield _batch(rows[first : first + batch_size], batch_size, seq_len, virtual)
            pool = [window for row in rows[whole:] for window in row]
            held = sum(_size(window, virtual) for window in pool)
    rows = _rows(pool, seq_len, virtual)
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        width, height = seq_len, batch_size
        if len(some) < batch_size:
            longest = max(sum(_size(window, virtual) for window in row) for row in some)
            width = min(seq_len, -(-longest // WIDTH_STEP) * WIDTH_STEP)
            height = min(batch_size, 1 << (len(some) - 1).bit_length())
        yield _batch(some, height, width, virtual)


def _size(window: Window, virtual: int) -> int:
    return len(window[1]) - 1 + virtual


def _rows(windows: list[Window], seq_len: int, virtual: int) -> list[list[Window]]:
    sizes = [_size(window, virtual) for window in windows]
    return [[windows[index] for index in row] for row in best_fit(sizes, seq_len)]


def _batch(rows: list[list[Window]], B: int, T: int, virtual: int) -> Batch:
    batch = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["documents"] = np.full((B, T), -1, np.int32)
    for number, row in enumerate(rows):
        begin = 0
        for segment, (document, ids) in enumerate(row, 1):
            here = slice(begin + virtual, begin + virtual + len(ids) - 1)
            batch["tokens"][number, here], batch["targets"][number, here] = ids[:-1], ids[1:]
            batch["documents"][number, here] = document
            batch["positions"][number, begin : here.stop] = np.arange(here.stop - begin)
            batch["segments"][number, begin : here.stop] = segment
            begin = here.stop
    return batch

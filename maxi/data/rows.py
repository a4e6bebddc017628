"""A stream of documents as rows of equal length, by random access: a row is a function of its number.

Documents are packed without a gap, as in GPT-3 (arXiv:2005.14165, section 2.3) but with segments, so that attention can
be kept inside a document. No state, no buffer: row i is cut out of the memory map when it is asked for.
"""

from typing import Any, Protocol

import numpy as np

Row = dict[str, np.ndarray]


class Rows(Protocol):
    """Rows by random access: a Grain RandomAccessDataSource (`len(rows)`, `rows[i]`).

    width: tokens of a row. layout: JSON that says how items become rows, part of a run's fingerprint. blank: a row that
    is all padding, with the keys of the others. real_tokens: how many of all tokens are not padding.
    """

    width: int
    layout: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def blank(self) -> Row: ...

    @property
    def real_tokens(self) -> int: ...


class PackedRows:
    """Rows of `seq_len` tokens; see `Rows`."""

    def __init__(
        self, tokens: np.ndarray, ends: np.ndarray, seq_len: int, *, across_documents: bool = False, keep_partial: bool = False
    ):
        """tokens: integers [n]; ends: int64 [documents], rising, one past each document's last token, the last is n.

        across_documents: documents run into each other, as one segment. keep_partial: the last row may be short and is
        then padded; otherwise what does not fill a row is left out.
        """
        self._tokens, self._ends = np.asarray(tokens), np.asarray(ends)
        self.width, self.layout, self._across_documents = seq_len, {"across_documents": across_documents}, across_documents
        self._rows = -(-len(tokens) // seq_len) if keep_partial else len(tokens) // seq_len

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:
        """Row `index`: tokens, targets, positions, segments (int32 [T]) and loss_weight (float32 [T]).

        targets: the next token of the same document; its last token has none (target 0, loss_weight 0).
        positions: from 0 at the start of the row and of every document. segments: 1, 2, ... in the row; 0 is padding.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        start = index * self.width
        stop = min(start + self.width, len(self._tokens))
        count = stop - start
        # Where documents end inside the row, counted from its start: in (0, count].
        first, last = np.searchsorted(self._ends, (start, stop), side="right")
        cuts = self._ends[first:last] - start
        if self._across_documents:
            cuts = cuts[cuts + start == len(self._tokens)]
        row = self.blank()
        row["tokens"][:count] = self._tokens[start:stop]
        following = self._tokens[start + 1 : stop + 1]
        row["targets"][: len(following)] = following
        row["loss_weight"][:count] = 1
        row["targets"][cuts - 1] = 0
        row["loss_weight"][cuts - 1] = 0
        begins = np.concatenate(([0], cuts[cuts < count]))
        lengths = np.diff(begins, append=count)
        row["segments"][:count] = np.repeat(np.arange(1, len(begins) + 1), lengths)
        row["positions"][:count] = np.arange(count) - np.repeat(begins, lengths)
        return row

    def blank(self) -> Row:
        return blank_row(self.width)

    @property
    def real_tokens(self) -> int:
        return min(len(self._tokens), len(self) * self.width)


def blank_row(seq_len: int) -> Row:
    """A row that is all padding: segment 0, weight 0."""
    row: Row = {name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    return {**row, "loss_weight": np.zeros(seq_len, np.float32)}

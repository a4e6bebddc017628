"""Documents as content of a cache: an item is a document, one part, its ids and then one end-of-sequence token."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from maxi.data import documents, workers
from maxi.data.cache import Counts, Item, TokenCache
from maxi.data.documents import Budget
from maxi.data.rows import PackedRows, Rows
from maxi.data.sample_rows import SampleRows
from maxi.data.tokenizer import Tokenizer
from maxi.sections import Source


class Texts:
    """See `maxi.data.cache.Content`. `processes` tokenise (0: one per core); `virtual` tokens stand before each document."""

    noun = "documents"
    has_weights = has_labels = False

    def __init__(
        self, tokenizer: Tokenizer, *, seq_len: int, across_documents: bool = False, processes: int = 1, virtual: int = 0
    ):
        self._tokenizer, self._processes, self.vocab_size = tokenizer, processes, tokenizer.vocab_size
        self._seq_len, self._across_documents, self._virtual = seq_len, across_documents, virtual

    def identity(self, source: Source) -> Any:
        return {"field": source.field, "tokenizer": self._tokenizer.fingerprint(), "eos": self._tokenizer.eos_id}

    def items(self, source: Source, budget: Budget, counts: Counts) -> Iterator[Item]:  # noqa: ARG002
        # texts go ahead to the workers; what else is known of them waits here
        marks: list[tuple[bytes, str]] = []

        def texts() -> Iterator[str]:
            for document in documents.read(source, budget):
                marks.append((document.text.encode(), document.where))
                yield document.text

        for ids, lengths in workers.encode(texts(), self._tokenizer, self._processes):
            stops = np.cumsum(lengths).tolist()
            for start, stop, (raw, where) in zip([0, *stops], stops, marks, strict=False):
                yield Item([np.append(ids[start:stop], np.int32(self._tokenizer.eos_id))], raw, where)
            del marks[: len(stops)]

    def rows(self, cache: TokenCache, keep_partial: bool) -> Rows:
        if self._virtual:
            return SampleRows(cache, self._seq_len, virtual=self._virtual)
        across = self._across_documents
        return PackedRows(cache.tokens, cache.ends, self._seq_len, across_documents=across, keep_partial=keep_partial)

    def describe(self, meta: dict[str, Any]) -> list[str]:  # noqa: ARG002
        return []

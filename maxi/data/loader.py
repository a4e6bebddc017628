"""Batches that are a function of the step: batch k is global rows k*B to (k+1)*B - 1 of an endless, shuffled mix.

Nothing has to be saved to resume, any number of hosts reads the same global order, and going to step k costs nothing.
Grain does the shuffling (a fresh order every epoch), the mixing and the reading ahead; only its random-access half
(`MapDataset`) is used, because restoring its iterators can lose a document without a word. Its stream repeats sources
that are short, so the share of each stays as configured. Grain imports jax, and takes a second: hence inside functions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxi.config import DataConfig, Source
from maxi.data import cache
from maxi.data.cache import TokenCache
from maxi.data.rows import PackedRows, Row, blank_row
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError

READ_THREADS = 2
READ_AHEAD = 4
"""Batches that are ready before they are asked for."""

Batch = dict[str, np.ndarray]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A source with its ids and rows; `side` says which: train, held-out or eval."""

    source: Source
    side: str
    cache: TokenCache
    rows: PackedRows

    def describe(self) -> str:
        meta = self.cache.meta
        counts = f"{meta['documents']:,} documents, {meta['tokens']:,} tokens, {len(self.rows):,} rows"
        skipped = f", {meta['skipped']} bad records skipped" if meta["skipped"] else ""
        files = f"{meta['files']} file{'s' if meta['files'] != 1 else ''}, " if self.source.path != "python-docs" else ""
        origin = "tokenised now" if self.cache.built else "from the cache"
        return f"{self.side} {self.source.path}: {files}{counts}{skipped} ({origin})"


class Batches:
    """The training batches: `batch(step)` by random access, `iterate(step)` reading ahead."""

    def __init__(self, opened: Sequence[Opened], *, seq_len: int, batch_size: int, seed: int):
        """Raises DataError when the sources have fewer rows than one batch, or one of them has none."""
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self._opened = tuple(opened)
        for entry in opened:
            if not len(entry.rows):
                what = f"the source has {entry.cache.meta['tokens']} tokens, less than one row of {seq_len}"
                raise DataError(what, entry.source.path, "lower seq_len, or give more text")
        if self.rows_per_epoch < batch_size:
            what = f"{self.rows_per_epoch} rows of {seq_len} tokens do not fill a batch of {batch_size}"
            raise DataError(
                what, ", ".join(entry.source.path for entry in opened), "lower batch_size or seq_len, or give more text"
            )
        self._mix = _mix(self._opened, seed)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources together. With several sources an epoch is that many rows of the mix, not each row once."""
        return sum(len(entry.rows) for entry in self._opened)

    @property
    def tokens(self) -> int:
        """Tokens of all sources together."""
        return sum(int(entry.cache.meta["tokens"]) for entry in self._opened)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the order of rows and what is in them: content, weights, seq_len, seed."""
        parts = [[entry.cache.fingerprint, entry.source.weight] for entry in self._opened]
        across = [entry.rows.across_documents for entry in self._opened]
        return hashlib.sha256(json.dumps([parts, across, self.seq_len, self.seed]).encode()).hexdigest()

    def describe(self) -> list[str]:
        """One line a source: files, documents, tokens, rows, and whether they came from the cache."""
        return [entry.describe() for entry in self._opened]

    def batch(self, step: int, shard: int = 0, shards: int = 1) -> Batch:
        """Batch number `step` (from 0), or of it part `shard` of `shards`: arrays [B/shards, T] with the keys of a row.

        Raises ConfigError when batch_size does not divide into the shards.
        """
        return self._part(shard, shards)[step * shards + shard]

    def iterate(self, start_step: int = 0, shard: int = 0, shards: int = 1) -> Iterator[Batch]:
        """`batch(start_step)`, `batch(start_step + 1)`, ... without end, read ahead by threads. Raises as `batch` does."""
        import grain

        parts = self._part(shard, shards).slice(slice(start_step * shards + shard, None, shards))
        return _close_after(iter(parts.to_iter_dataset(grain.ReadOptions(READ_THREADS, READ_AHEAD))))

    def _part(self, shard: int, shards: int) -> Any:
        """The mix as parts of a batch: part k*shards + j is what shard j reads for batch k."""
        if self.batch_size % shards or not 0 <= shard < shards:
            raise ConfigError(f"batch_size {self.batch_size} does not divide into {shards} shards", "batch_size", "change it")
        return self._mix.batch(self.batch_size // shards, drop_remainder=True, batch_fn=stack)


class EvalRows:
    """The evaluation batches, always the same rows in the same order."""

    def __init__(self, opened: Sequence[Opened], *, seq_len: int, batch_size: int):
        self.seq_len, self.batch_size = seq_len, batch_size
        self._opened = tuple(opened)
        self._offsets = np.cumsum([0, *(len(entry.rows) for entry in opened)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> Row:
        """Row `index`, counted through the sources in their order."""
        which = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return self._opened[which].rows[index - int(self._offsets[which])]

    def describe(self) -> list[str]:
        """One line a source, as for training."""
        return [entry.describe() for entry in self._opened]

    def batches(self, max_rows: int, shard: int = 0, shards: int = 1) -> Iterator[Batch]:
        """At most `max_rows` rows, evenly spaced if there are more, in batches [B/shards, T]; the last is padded with
        rows of segment 0 and loss_weight 0. Raises ConfigError when batch_size does not divide into the shards."""
        if self.batch_size % shards or not 0 <= shard < shards:
            raise ConfigError(f"batch_size {self.batch_size} does not divide into {shards} shards", "batch_size", "change it")
        count, size = min(max_rows, len(self)), self.batch_size // shards
        chosen = np.arange(count) * len(self) // max(count, 1)
        for start in range(0, count, self.batch_size):
            mine = chosen[start + shard * size : min(start + (shard + 1) * size, start + self.batch_size)]
            rows = [self[int(index)] for index in mine]
            yield stack(rows + [blank_row(self.seq_len)] * (size - len(rows)))


def open_data(
    data: DataConfig, tokenizer: Tokenizer, *, seq_len: int, batch_size: int, seed: int, log: Log
) -> tuple[Batches, EvalRows | None]:
    """Tokenises (or finds in the cache) all that a run reads; EvalRows is None when neither data.eval nor
    data.eval_share is given. Raises DataError for sources that cannot be read or do not fill a batch."""

    def opened(source: Source, side: str) -> Opened:
        split = "eval" if side == "held-out" else "train" if side == "train" and data.eval_share else "all"
        found = cache.build(
            source,
            tokenizer,
            split=split,
            eval_share=data.eval_share,
            cache_dir=data.cache_dir,
            workers=data.workers,
            skip_bad=data.skip_bad,
            log=log,
        )
        keep = side != "train"
        rows = PackedRows(found.tokens, found.ends, seq_len, across_documents=data.across_documents, keep_partial=keep)
        return Opened(source, side, found, rows)

    train = [opened(source, "train") for source in data.train]
    held_out = [opened(source, "held-out") for source in data.train if data.eval_share]
    evaluated = held_out + [opened(source, "eval") for source in data.eval]
    if evaluated and not any(len(entry.rows) for entry in evaluated):
        fix = "raise data.eval_share, give data.eval, or give more documents"
        raise DataError("no document fell into the held-out share", "data.eval_share", fix)
    batches = Batches(train, seq_len=seq_len, batch_size=batch_size, seed=seed)
    return batches, EvalRows(evaluated, seq_len=seq_len, batch_size=batch_size) if evaluated else None


def stack(rows: Sequence[Row]) -> Batch:
    """Rows [T] to a batch [B, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _mix(opened: Sequence[Opened], seed: int) -> Any:
    """The endless stream of rows. Each source has a shuffle seed of its own, far from those of other runs: Grain uses
    seed + epoch, so neighbouring seeds would see each other's orders one epoch later."""
    import grain

    seeds = np.random.SeedSequence(seed).generate_state(len(opened), np.uint32)
    sources = [
        grain.MapDataset.source(entry.rows).shuffle(seed=int(own)).repeat() for entry, own in zip(opened, seeds, strict=True)
    ]
    if len(sources) == 1:
        return sources[0]
    return grain.MapDataset.mix(sources, [entry.source.weight for entry in opened])


def _close_after(batches: Any) -> Iterator[Batch]:
    """The same batches; the reading threads end with the generator."""
    try:
        yield from batches
    finally:
        batches.close()

"""Batches that are a function of the step: batch k is global rows k*B to (k+1)*B - 1 of an endless, shuffled mix.

Nothing has to be saved to resume, any number of hosts reads the same global order, and going to step k costs nothing.
Grain does the shuffling (a fresh order every epoch), the mixing and the reading ahead; only its random-access half
(`MapDataset`) is used, because restoring its iterators can lose a document without a word. Its stream repeats sources
that are short, so the share of each stays as configured. Grain imports jax, and takes a second: hence inside functions.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from maxi.data import cache, documents
from maxi.data.cache import Content, TokenCache
from maxi.data.chat_template import ChatTemplate
from maxi.data.examples import Examples, Kind
from maxi.data.rows import Row, Rows
from maxi.data.sample_rows import PairRows
from maxi.data.skipping import Skips, batch_of, stretches
from maxi.data.texts import Texts
from maxi.data.tokenizer import Tokenizer
from maxi.errors import ConfigError, DataError
from maxi.sections import ChatConfig, DataConfig, Source

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
    content: Content
    cache: TokenCache
    rows: Rows

    @property
    def fill(self) -> float:
        """Real tokens over all tokens of the rows."""
        return self.rows.real_tokens / max(len(self.rows) * self.rows.width, 1)

    def describe(self) -> list[str]:
        """What there is to know: sizes first, then what the content has to say of it."""
        meta = self.cache.meta
        counts = f"{meta['items']:,} {self.content.noun}, {meta['tokens']:,} tokens, {len(self.rows):,} rows"
        fill = f", {self.fill:.1%} of them real tokens" if self.content.has_weights else ""
        skipped = f", {meta['skipped']} bad records skipped" if meta["skipped"] else ""
        embedded = self.source.path in documents.EMBEDDED
        files = "" if embedded else f"{meta['files']} file{'s' if meta['files'] != 1 else ''}, "
        origin = "tokenised now" if self.cache.built else "from the cache"
        first = f"{self.side} {self.source.path}: {files}{counts}{fill}{skipped} ({origin})"
        return [first, *(f"  {line}" for line in self.content.describe(meta) if self.side != "held-out")]


class Batches:
    """The training batches: `batch(step)` by random access, `iterate(step)` reading ahead."""

    def __init__(self, opened: Sequence[Opened], *, batch_size: int, seed: int, skips: Skips = ()):
        """`skips`: batches that no step reads. Raises DataError when the sources have fewer rows than one batch, or one of
        them has none."""
        self._skips = skips
        self.opened, self.batch_size, self.seed, self.width = tuple(opened), batch_size, seed, opened[0].rows.width
        for entry in opened:
            if not len(entry.rows):
                what = f"the source has {entry.cache.meta['tokens']} tokens, less than one row of {self.width}"
                raise DataError(what, entry.source.path, "lower seq_len, or give more text")
        if self.rows_per_epoch < batch_size:
            what = f"{self.rows_per_epoch} rows of {self.width} tokens do not fill a batch of {batch_size}"
            raise DataError(
                what, ", ".join(entry.source.path for entry in opened), "lower batch_size or seq_len, or give more text"
            )
        self._mix = _mix(self.opened, seed)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources together. With several sources an epoch is that many rows of the mix, not each row once."""
        return sum(len(entry.rows) for entry in self.opened)

    @property
    def tokens(self) -> int:
        """Tokens of all sources together."""
        return sum(int(entry.cache.meta["tokens"]) for entry in self.opened)

    @property
    def items(self) -> int:
        """Documents, conversations or pairs of all sources together."""
        return sum(int(entry.cache.meta["items"]) for entry in self.opened)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the order of rows and what is in them: content, weights, row length, seed."""
        parts = [[entry.cache.fingerprint, entry.source.weight, entry.rows.layout] for entry in self.opened]
        return hashlib.sha256(json.dumps([parts, self.width, self.seed]).encode()).hexdigest()

    def describe(self) -> list[str]:
        """Of every source: files, documents, tokens, rows, whether they came from the cache, and what was done to them."""
        return [line for entry in self.opened for line in entry.describe()]

    def batch(self, step: int, shard: int = 0, shards: int = 1) -> Batch:
        """What step `step` (from 0) reads, or of it part `shard` of `shards`: arrays [B/shards, T] with the keys of a row.

        Raises ConfigError when batch_size does not divide into the shards.
        """
        return self._part(shard, shards)[batch_of(step, self._skips) * shards + shard]

    def iterate(self, start_step: int = 0, shard: int = 0, shards: int = 1) -> Iterator[Batch]:
        """`batch(start_step)`, `batch(start_step + 1)`, ... without end, read ahead by threads. Raises as `batch` does."""
        import grain

        parts = self._part(shard, shards)
        reading = grain.ReadOptions(READ_THREADS, READ_AHEAD)

        def read() -> Iterator[Batch]:
            for first, stop in stretches(start_step, self._skips):
                chosen = slice(first * shards + shard, None if stop is None else stop * shards, shards)
                yield from _close_after(iter(parts.slice(chosen).to_iter_dataset(reading)))

        return read()

    def _part(self, shard: int, shards: int) -> Any:
        """The mix as parts of a batch: part k*shards + j is what shard j reads for batch k."""
        if self.batch_size % shards or not 0 <= shard < shards:
            raise ConfigError(f"batch_size {self.batch_size} does not divide into {shards} shards", "batch_size", "change it")
        return self._mix.batch(self.batch_size // shards, drop_remainder=True, batch_fn=stack)


class EvalRows:
    """The evaluation batches, always the same rows in the same order."""

    def __init__(self, opened: Sequence[Opened], *, batch_size: int):
        self.opened, self.batch_size = tuple(opened), batch_size
        self._offsets = np.cumsum([0, *(len(entry.rows) for entry in opened)])

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> Row:
        """Row `index`, counted through the sources in their order."""
        which = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return self.opened[which].rows[index - int(self._offsets[which])]

    def describe(self) -> list[str]:
        """As for training."""
        return [line for entry in self.opened for line in entry.describe()]

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
            yield stack(rows + [self.opened[0].rows.blank()] * (size - len(rows)))


def open_data(data: DataConfig, content: Content, *, batch_size: int, seed: int, log: Log) -> tuple[Batches, EvalRows | None]:
    """Makes (or finds in the cache) all that a run reads; EvalRows is None when neither data.eval nor data.eval_share is
    given. Raises DataError for sources that cannot be read or do not fill a batch."""

    def opened(source: Source, side: str) -> Opened:
        split = "eval" if side == "held-out" else "train" if side == "train" and data.eval_share else "all"
        found = cache.build(
            source,
            content,
            split=split,
            eval_share=data.eval_share,
            cache_dir=data.cache_dir,
            skip_bad=data.skip_bad,
            log=log,
        )
        return Opened(source, side, content, found, content.rows(found, keep_partial=side != "train"))

    train = [opened(source, "train") for source in data.train]
    held_out = [opened(source, "held-out") for source in data.train if data.eval_share]
    evaluated = held_out + [opened(source, "eval") for source in data.eval]
    if evaluated and not any(len(entry.rows) for entry in evaluated):
        fix = "raise data.eval_share, give data.eval, or give more documents"
        raise DataError(f"no {content.noun} fell into the held-out share", "data.eval_share", fix)
    for entry in (pairs := pair_rows([*train, *evaluated])):
        entry.pairs = max(other.most_items for other in pairs)  # rows that are stacked have room for as many pairs
    batches = Batches(train, batch_size=batch_size, seed=seed, skips=data.skip_batches)
    return batches, EvalRows(evaluated, batch_size=batch_size) if evaluated else None


@contextmanager
def open_template(rows: str, chat: ChatConfig, tokenizer: Tokenizer) -> Iterator[ChatTemplate | None]:
    """The template that conversations are rendered with; None where `rows` are documents.

    From then on it is the tokenizer's own, and the token that ends its turns ends generations, so that what is saved and
    served is what was trained. Raises ConfigError when there is none that can be used.
    """
    if rows == "documents":
        yield None
        return
    with ChatTemplate(tokenizer, chat.template, chat.template_kwargs) as template:
        tokenizer.chat_template = template.text
        tokenizer.eos_ids = tuple(dict.fromkeys([template.end_token_id, *tokenizer.eos_ids]))
        yield template


def content_of(
    rows: str,
    data: DataConfig,
    chat: ChatConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_len: int,
    virtual: int = 0,
) -> Content:
    """What sources are made into: `rows` is documents, or conversations, preferences or labels, which need a template;
    `virtual` places are left free before each of them (see `sample_rows.py`)."""
    if rows == "documents":
        across = data.across_documents
        return Texts(tokenizer, seq_len=seq_len, across_documents=across, processes=data.workers, virtual=virtual)
    assert template is not None
    return Examples(cast(Kind, rows), tokenizer, template, chat, seq_len, virtual)


def pair_rows(opened: Sequence[Opened]) -> list[PairRows]:
    """The rows among them that hold pairs: all or none."""
    return [entry.rows for entry in opened if isinstance(entry.rows, PairRows)]


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

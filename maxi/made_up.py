"""Made-up rows, packed like real ones: random ids, documents and samples of lognormal length.

They go through the code that packs real ones, so a batch has what a step takes. What is learned of them means nothing.
"""

import numpy as np

from maxi.config import Config
from maxi.data.cache import TokenCache
from maxi.data.rows import PackedRows, Row, Rows
from maxi.data.sample_rows import PairRows, SampleRows

SPREAD = 1.0
"""Standard deviation of the logarithm of lengths."""


def lengths(rng: np.random.Generator, mean: int, total: int, most: int) -> np.ndarray:
    """Lognormal lengths of this mean, between 2 and `most`, that add up to `total` or a little more."""
    found = np.zeros(0, np.int64)
    while found.sum() < total:
        drawn = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, 1 + total // mean)
        found = np.concatenate([found, np.clip(drawn.astype(np.int64), 2, most)])
    return found[: int(np.searchsorted(np.cumsum(found), total)) + 1]


def made_up(config: Config, kind: str, vocab_size: int, mean: int, count: int) -> list[Row]:
    """`count` rows of what an objective of this `rows` reads: ids below `vocab_size`, items of `mean` tokens on average."""
    rng = np.random.default_rng(config.seed)
    rows = _rows(config, kind, rng, vocab_size, mean, count)
    return [rows[number] for number in range(count)]


def _rows(config: Config, kind: str, rng: np.random.Generator, vocab_size: int, mean: int, count: int) -> Rows:
    seq_len, pairs = config.seq_len, kind in ("preferences", "labels")
    if kind == "documents":
        sizes = parts = lengths(rng, mean, count * seq_len, 1 << 62)
    else:
        # More than enough: what packing leaves empty, and a row of pairs has two answers with their prompts.
        sizes = parts = lengths(rng, mean, count * seq_len * (4 if pairs else 2), seq_len)
    if pairs:
        parts = _branches(rng, sizes, 2 if kind == "preferences" else 1)
    ends = np.cumsum(parts)
    tokens = rng.integers(0, vocab_size, int(ends[-1]), dtype=np.int32)
    if kind == "documents":
        return PackedRows(tokens, ends, seq_len, across_documents=config.data.across_documents)
    labels = rng.integers(0, 2, len(sizes), dtype=np.uint8) if kind == "labels" else None
    cache = TokenCache(tokens, ends, np.ones(len(tokens), np.float32), labels, {}, "", True)
    if not pairs:
        return SampleRows(cache, seq_len, pack=config.chat.pack)
    rows = PairRows(cache, seq_len, pack=config.chat.pack, share_prompt=config.chat.share_prompt)
    rows.reference = np.full((len(sizes), 2), -np.log(vocab_size) * mean / 2, np.float32)
    return rows


def _branches(rng: np.random.Generator, sizes: np.ndarray, answers: int) -> np.ndarray:
    """Lengths of prompt and answers, one after the other, of items in which prompt and one answer have these sizes."""
    prompts = np.maximum(1, (sizes * rng.uniform(0.3, 0.7, len(sizes))).astype(np.int64))
    rest = [np.maximum(1, sizes - prompts)]
    if answers == 2:
        rest.append(np.maximum(1, (rest[0] * rng.uniform(0.5, 1.0, len(sizes))).astype(np.int64)))
    return np.stack([prompts, *rest], axis=1).reshape(-1)

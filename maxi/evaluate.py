"""How well a model predicts text: loss in nats per token, perplexity, and bits per byte, which tokenizers share.

Every token of a document is predicted but its first, the end-of-sequence token after it too. A document longer than
`seq_len` is cut into windows, each of which starts without context; the token after a window's last is still predicted
by that window. Windows are packed into rows with segments and positions, which changes speed and nothing else.

Bits per byte divide the nats of the predicted tokens that stand for text by the bytes of those tokens, so special
tokens (the end of sequence) count on neither side, and neither does a document's first token. Sums are float64.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from maxi.config import Source
from maxi.data.documents import Budget, read
from maxi.errors import ConfigError, DataError, ModelFolderError, NumericsError
from maxi.generation import Same
from maxi.models import Model, decoder
from maxi.models.decoder import Compute
from maxi.params import Tree
from maxi.pretrained import open_model
from maxi.run import write_whole

if TYPE_CHECKING:
    from maxi.data.tokenizer import Tokenizer
    from maxi.hf import Loaded

log = logging.getLogger("maxi")

Batch = dict[str, np.ndarray]
StepFn = Callable[[Tree, Any], jax.Array]

MAX_SEQ_LEN = 1024
"""The default `seq_len`, unless the model's max_position_embeddings is less."""
ENCODE_AT_ONCE = 256
"""Documents tokenised together."""
POOL_ROWS = 64
"""Rows' worth of windows from which rows are packed: more leaves fewer gaps and holds more documents in memory."""
WIDTH_STEP = 256
"""The last batch is no wider than it must be, in multiples of this."""


def eval_step(model: Model, compute: Compute) -> StepFn:
    """A function of (params, batch) that gives the log-probability of each target, float32 [B, T].

    It needs tokens, targets, positions and segments of the batch, int32 [B, T] each, and is compiled once per shape,
    also when `eval_step` is called again.
    """

    def step(params: Tree, batch: Any) -> jax.Array:
        needed = {name: batch[name] for name in ("tokens", "targets", "positions", "segments")}
        return _logprobs(Same(model), compute, params, needed)

    return step


@partial(jax.jit, static_argnums=(0, 1))
def _logprobs(same: Same, compute: Compute, params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    return decoder.logprobs(same.model, params, batch, compute)[0]


@dataclass
class _Sums:
    """What a loss is made of: nats and tokens of all predictions, nats and bytes of those that stand for text."""

    nats: float = 0.0
    weight: float = 0.0
    text_nats: float = 0.0
    text_bytes: float = 0.0
    tokens: int = 0

    def add(self, nats: np.ndarray, weight: np.ndarray, n_bytes: np.ndarray | None) -> None:
        """Float64 [n] each, of n predictions; bytes None when a token's bytes are not known."""
        self.nats += float(nats @ weight)
        self.weight += float(weight.sum())
        self.tokens += int((weight > 0).sum())
        if n_bytes is not None:
            self.text_nats += float(nats @ (weight * (n_bytes > 0)))
            self.text_bytes += float(weight @ n_bytes)

    def figures(self) -> dict[str, Any]:
        """loss, perplexity, bits_per_byte and tokens; None for what cannot be told."""
        loss = self.nats / self.weight if self.weight else None
        bits = self.text_nats / math.log(2) / self.text_bytes if self.text_bytes else None
        perplexity = None if loss is None else float(np.exp(np.minimum(loss, 700.0)))  # beyond, float64 ends
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": self.tokens}


def measure(
    step_fn: StepFn,
    params: Tree,
    batches: Iterable[Batch],
    token_bytes: np.ndarray | None,
    place: Callable[[Batch], Any] | None = None,
) -> dict[str, Any]:
    """loss (nats per token), perplexity, bits_per_byte (None when unknown) and tokens (predicted) over `batches`.

    step_fn: from `eval_step`. batches: as `maxi.data` makes them, [B, T] each, `loss_weight` deciding what counts.
    token_bytes: int32 [V] from the tokenizer, or None. place: puts a batch on devices. Raises DataError when nothing is
    predicted.
    """
    sums = _Sums()
    for batch, nats_BT in _scored(step_fn, params, batches, place):
        weight_BT = np.asarray(batch["loss_weight"], np.float64)
        counts = weight_BT > 0
        sums.add(nats_BT[counts], weight_BT[counts], _bytes_of(batch["targets"][counts], token_bytes))
    if not sums.tokens:
        raise DataError("there is no token to predict", "evaluation", "give documents of at least two tokens")
    return sums.figures()


def evaluate(
    loaded: "Loaded",
    paths: Sequence[str],
    *,
    field: str = "text",
    seq_len: int | None = None,
    batch_size: int = 8,
    rows: bool = False,
    compute: Compute | None = None,
) -> dict[str, Any]:
    """A model's figures on the documents of `paths` (files, folders, globs: whatever `data.train` takes).

    Returns loss (mean nats per predicted token), perplexity, bits_per_byte (None when the tokenizer cannot tell),
    tokens (predicted), documents, bytes (of the predicted tokens), seconds and tokens_per_s (compiling included);
    with `rows` also a list of {where, tokens, loss, perplexity, bits_per_byte}, one per document in order, the figures
    None where it has one token only. `seq_len`: the longest context, by default 1024 or what the model was made for.
    `compute` defaults to the weights' dtype. Raises DataError for files that cannot be read or hold nothing to
    predict, ConfigError for a size out of range or a tokenizer with more ids than the model, ModelFolderError without
    a tokenizer, NumericsError when the loss is not finite.
    """
    tokenizer, model = _tokenizer(loaded), loaded.model
    seq_len = min(MAX_SEQ_LEN, model.rope.max_position) if seq_len is None else seq_len
    if seq_len < 1 or batch_size < 1:
        raise ConfigError(f"seq_len {seq_len} x batch_size {batch_size}", "eval", "both must be at least 1")
    if seq_len > model.rope.max_position:
        log.warning("eval: seq_len %d is over the model's max_position_embeddings %d", seq_len, model.rope.max_position)
    begun = time.monotonic()
    corpus = _Corpus(tokenizer, paths, field)
    batches = _packed(corpus.windows(seq_len), seq_len, batch_size)
    step_fn, token_bytes = eval_step(model, compute or Compute(dtype=loaded.params["embed"].dtype)), tokenizer.token_bytes()
    for batch, nats_BT in _scored(step_fn, loaded.params, batches, None):
        _count(corpus.sums, batch, nats_BT, token_bytes)
    total = _Sums()
    for sums in corpus.sums:
        for name, value in vars(sums).items():
            setattr(total, name, getattr(total, name) + value)
    if not total.tokens:
        raise DataError("there is no token to predict", ", ".join(paths), "give documents of at least two tokens")
    if not math.isfinite(total.nats):
        raise NumericsError("the loss is not finite", "eval", "the model's weights are damaged or diverged")
    seconds = time.monotonic() - begun
    report: dict[str, Any] = total.figures() | {"documents": len(corpus.where), "bytes": None, "seconds": seconds}
    if token_bytes is not None:
        report["bytes"] = int(total.text_bytes)
    report["tokens_per_s"] = total.tokens / seconds
    if rows:
        pairs = zip(corpus.where, corpus.sums, strict=True)
        report["rows"] = [{"where": where} | sums.figures() for where, sums in pairs]
    return report


def table(report: dict[str, Any]) -> str:
    """A report of `evaluate` as plain text: its documents, if it has them, then the whole."""
    lines = []
    if "rows" in report:
        lines += [f"{'loss':>9} {'perplexity':>12} {'bits/byte':>9} {'tokens':>9}  document"]
        lines += ["{} {} {} {:>9,}  {}".format(*_shown(row), row["tokens"], row["where"]) for row in report["rows"]] + [""]
    loss, perplexity, bits = (text.strip() for text in _shown(report))
    size = "" if report["bytes"] is None else f", {report['bytes']:,} bytes"
    return "\n".join(
        [
            *lines,
            f"loss           {loss} nats per token",
            f"perplexity     {perplexity}",
            f"bits per byte  {bits}",
            f"tokens         {report['tokens']:,} predicted in {report['documents']:,} documents{size}",
            f"time           {report['seconds']:.1f} s, {report['tokens_per_s']:,.0f} tokens/s",
        ]
    )


def run_eval(
    model_path: str | Path,
    paths: Sequence[str],
    *,
    field: str = "text",
    json_out: str | Path | None = None,
    rows: bool = False,
    seq_len: int | None = None,
    batch_size: int = 8,
    out: TextIO,
) -> None:
    """`maxi eval`: the table to `out`, and the report as JSON to `json_out`, written whole or not at all.

    Raises as `open_model` and `evaluate` do, ConfigError when `json_out` cannot be written.
    """
    if json_out is not None and not Path(json_out).expanduser().parent.is_dir():
        raise ConfigError("the folder of --json does not exist", str(json_out), "create it first")
    report = evaluate(open_model(model_path), paths, field=field, seq_len=seq_len, batch_size=batch_size, rows=rows)
    out.write(table(report) + "\n")
    if json_out is not None:
        report = {"model": str(model_path), "data": list(paths)} | report
        try:
            write_whole(Path(json_out).expanduser(), json.dumps(report, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write the report, {error.strerror}", str(json_out), "name another file") from None


def _shown(figures: dict[str, Any]) -> tuple[str, str, str]:
    loss, perplexity, bits = (figures[name] for name in ("loss", "perplexity", "bits_per_byte"))
    return (
        f"{'-' if loss is None else format(loss, '.4f'):>9}",
        f"{'-' if perplexity is None else format(perplexity, '.6g'):>12}",
        f"{'-' if bits is None else format(bits, '.4f'):>9}",
    )


def _tokenizer(loaded: "Loaded") -> "Tokenizer":
    """Raises ModelFolderError when there is none, ConfigError when it has ids that the model does not know."""
    if loaded.tokenizer is None:
        raise ModelFolderError("the model's folder has no tokenizer", str(loaded.folder), "put tokenizer.json there")
    ids, known = loaded.tokenizer.vocab_size, loaded.model.vocab_size
    if ids > known:
        what = f"the tokenizer has {ids:,} ids but the model {known:,}"
        raise ConfigError(what, str(loaded.folder), "take the tokenizer that belongs to the model")
    return loaded.tokenizer


def _bytes_of(targets: np.ndarray, token_bytes: np.ndarray | None) -> np.ndarray | None:
    return None if token_bytes is None else token_bytes[targets].astype(np.float64)


def _scored(
    step_fn: StepFn, params: Tree, batches: Iterable[Batch], place: Callable[[Batch], Any] | None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """(batch, nats float64 [B, T]); the device works on the next batch while the caller looks at one."""
    waiting: tuple[Batch, jax.Array] | None = None
    for batch in batches:
        started = batch, step_fn(params, place(batch) if place else {k: jnp.asarray(v) for k, v in batch.items()})
        if waiting:
            yield waiting[0], -np.asarray(waiting[1], np.float64)
        waiting = started
    if waiting:
        yield waiting[0], -np.asarray(waiting[1], np.float64)


@dataclass
class _Corpus:
    """Documents as they are read: `where` each is and the `sums` of its predictions."""

    tokenizer: "Tokenizer"
    paths: Sequence[str]
    field: str
    where: list[str] = dataclasses.field(default_factory=list)
    sums: list[_Sums] = dataclasses.field(default_factory=list)

    def windows(self, seq_len: int) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the document, its ids): at most seq_len inputs and, one on, their targets, so seq_len + 1 ids."""
        for documents in self._groups():
            encoded = self.tokenizer.encode([document.text for document in documents])
            for document, text_ids in zip(documents, encoded, strict=True):
                number = len(self.where)
                self.where.append(document.where)
                self.sums.append(_Sums())
                ids = np.append(text_ids, np.int32(self.tokenizer.eos_id))
                for first in range(0, len(ids) - 1, seq_len):
                    yield number, ids[first : first + seq_len + 1]

    def _groups(self) -> Iterator[list[Any]]:
        group: list[Any] = []
        for path in self.paths:
            for document in read(Source(path=path, field=self.field), Budget()):
                group.append(document)
                if len(group) == ENCODE_AT_ONCE:
                    yield group
                    group = []
        if group:
            yield group


Window = tuple[int, np.ndarray]


def _packed(windows: Iterable[Window], seq_len: int, batch_size: int) -> Iterator[Batch]:
    """Batches [batch_size, seq_len] of whole windows, longest first into the first row with room.

    Beside tokens, targets, positions and segments there is `documents`: the number of each token's, -1 for padding.
    All batches have one shape but the last, which is no larger than it must be.
    """
    pool: list[Window] = []
    held = 0
    for window in windows:
        pool.append(window)
        held += len(window[1]) - 1
        if held >= max(POOL_ROWS, 2 * batch_size) * seq_len:
            packed = _first_fit(pool, seq_len)
            whole = len(packed) // batch_size * batch_size
            for first in range(0, whole, batch_size):
                yield _batch(packed[first : first + batch_size], batch_size, seq_len)
            pool = [window for row in packed[whole:] for window in row]
            held = sum(len(ids) - 1 for _, ids in pool)
    packed = _first_fit(pool, seq_len)
    for first in range(0, len(packed), batch_size):
        some = packed[first : first + batch_size]
        width, rows = seq_len, batch_size
        if len(some) < batch_size:
            longest = max(sum(len(ids) - 1 for _, ids in row) for row in some)
            width, rows = (
                min(seq_len, -(-longest // WIDTH_STEP) * WIDTH_STEP),
                min(batch_size, 1 << (len(some) - 1).bit_length()),
            )
        yield _batch(some, rows, width)


def _first_fit(windows: list[Window], seq_len: int) -> list[list[Window]]:
    rows: list[list[Window]] = []
    room: list[int] = []
    full = 0  # rows before this have no room for anything
    for window in sorted(windows, key=lambda window: -len(window[1])):
        size = len(window[1]) - 1
        place = next((i for i in range(full, len(rows)) if room[i] >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(seq_len)
        rows[place].append(window)
        room[place] -= size
        while full < len(rows) and not room[full]:
            full += 1
    return rows


def _batch(rows: list[list[Window]], B: int, T: int) -> Batch:
    batch = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch["documents"] = np.full((B, T), -1, np.int32)
    for number, row in enumerate(rows):
        at = 0
        for segment, (document, ids) in enumerate(row, 1):
            here = slice(at, at + len(ids) - 1)
            batch["tokens"][number, here], batch["targets"][number, here] = ids[:-1], ids[1:]
            batch["positions"][number, here] = np.arange(len(ids) - 1)
            batch["segments"][number, here], batch["documents"][number, here] = segment, document
            at = here.stop
    return batch


def _count(sums: list[_Sums], batch: Batch, nats_BT: np.ndarray, token_bytes: np.ndarray | None) -> None:
    """Adds a batch's predictions to the sums of their documents."""
    order = np.argsort(batch["documents"], axis=None, kind="stable")
    documents, nats, targets = (array.ravel()[order] for array in (batch["documents"], nats_BT, batch["targets"]))
    numbers, starts = np.unique(documents, return_index=True)
    for number, start, stop in zip(numbers, starts, [*starts[1:], len(documents)], strict=True):
        if number >= 0:
            part = slice(start, stop)
            sums[number].add(nats[part], np.ones(stop - start), _bytes_of(targets[part], token_bytes))

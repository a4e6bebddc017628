"""How well a model predicts text, and how it goes on by itself.

Loss in nats per token, perplexity, and bits per byte, which tokenizers share; and the scores of greedy completions
(`scores.py`).

Every token of a document is predicted but its first, the end-of-sequence token after it too. A document longer than
`seq_len` is cut into windows, each of which starts without context; the token after a window's last is still predicted
by that window. Windows are packed into rows with segments and positions (`maxi.data.windows`), which changes speed and
nothing else.

Bits per byte divide the nats of the predicted tokens that stand for text by the bytes of those tokens, so special
tokens (the end of sequence) count on neither side, and neither does a document's first token. Sums are float64.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from maxi import scores
from maxi.adapters import virtual
from maxi.data import prompts as prompt_files
from maxi.data.windows import Window, cut, encoded, packed
from maxi.errors import ConfigError, DataError, NumericsError
from maxi.generation import Prompt, Same, complete, conversation, ids_of, open_chat, tokenizer_of, unstacked, visible
from maxi.models import Model, decoder
from maxi.models.decoder import Compute
from maxi.models.sampling import Sampling
from maxi.objectives import Sums
from maxi.params import Tree
from maxi.pretrained import open_model
from maxi.sharding import fetch
from maxi.whole import write_whole

if TYPE_CHECKING:
    from maxi.data.chat_template import ChatTemplate
    from maxi.hf import Loaded

log = logging.getLogger("maxi")

T = TypeVar("T")
Batch = dict[str, np.ndarray]
StepFn = Callable[[Tree, Any], jax.Array]

MAX_SEQ_LEN = 1024
"""The default `seq_len`, unless the model's max_position_embeddings is less."""


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
    token_bytes: int32 [V] from the tokenizer, or None. place: puts a batch on devices. Of several processes each takes
    all batches and comes to the same figures. Raises DataError when nothing is
    predicted.
    """
    sums = _Sums()
    for batch, logprobs_BT in _ahead(step_fn, params, batches, place):
        nats_BT = -fetch(logprobs_BT).astype(np.float64)
        weight_BT = np.asarray(batch["loss_weight"], np.float64)
        counts = weight_BT > 0
        sums.add(nats_BT[counts], weight_BT[counts], _bytes_of(batch["targets"][counts], token_bytes))
    if not sums.tokens:
        raise DataError("there is no token to predict", "evaluation", "give documents of at least two tokens")
    return sums.figures()


def measure_sums(
    step_fn: Callable[[Tree, Any], Sums],
    params: Tree,
    batches: Iterable[Batch],
    place: Callable[[Batch], Any] | None = None,
) -> dict[str, float]:
    """An objective's own figures over `batches`: `loss`, and its metrics by their names without `train/`.

    step_fn: (params, batch) to the `Sums` of the whole batch. Numerators and denominators are added up in float64 and
    divided once; a metric whose denominator is 0 is 0, and a metric named train/loss is the `loss`, as in training.
    Raises DataError when the weights of all batches come to nothing.
    """
    totals: dict[str, np.ndarray] = {}
    weight = 0.0
    for _, sums in _ahead(step_fn, params, batches, place):
        weight += float(sums.weight)
        for name, pair in {"train/loss": (sums.loss, sums.weight), **sums.metrics}.items():
            name = name.removeprefix("train/")
            totals[name] = totals.get(name, 0.0) + np.array([float(part) for part in pair])
    if not weight:
        raise DataError("there is nothing to measure", "evaluation", "give rows that count in the loss")
    return {name: float(total / count) if count else 0.0 for name, (total, count) in totals.items()}


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
    tokenizer, model = tokenizer_of(loaded), loaded.model
    seq_len = min(MAX_SEQ_LEN, model.rope.max_position) if seq_len is None else seq_len
    before = virtual.count(loaded.params)
    if seq_len < 1 or batch_size < 1:
        raise ConfigError(f"seq_len {seq_len} x batch_size {batch_size}", "eval", "both must be at least 1")
    if seq_len <= before:
        raise ConfigError(f"seq_len {seq_len} has no room beside {before} virtual tokens", "eval", "raise it")
    if seq_len > model.rope.max_position:
        log.warning("eval: seq_len %d is over the model's max_position_embeddings %d", seq_len, model.rope.max_position)
    begun = time.monotonic()
    where: list[str] = []
    sums: list[_Sums] = []

    def windows() -> Iterator[Window]:
        for name, ids in encoded(tokenizer, paths, field):
            where.append(name)
            sums.append(_Sums())
            yield from cut(len(sums) - 1, ids, seq_len - before)

    step_fn, token_bytes = eval_step(model, compute or Compute(dtype=loaded.params["embed"].dtype)), tokenizer.token_bytes()
    for batch, logprobs_BT in _ahead(step_fn, loaded.params, packed(windows(), seq_len, batch_size, before), None):
        _count(sums, batch, -np.asarray(logprobs_BT, np.float64), token_bytes)
    total = _Sums()
    for part in sums:
        for name, value in vars(part).items():
            setattr(total, name, getattr(total, name) + value)
    if not total.tokens:
        raise DataError("there is no token to predict", ", ".join(paths), "give documents of at least two tokens")
    if not math.isfinite(total.nats):
        raise NumericsError("the loss is not finite", "eval", "the model's weights are damaged or diverged")
    seconds = time.monotonic() - begun
    report: dict[str, Any] = total.figures() | {"documents": len(where), "bytes": None, "seconds": seconds}
    if token_bytes is not None:
        report["bytes"] = int(total.text_bytes)
    report["tokens_per_s"] = total.tokens / seconds
    if rows:
        report["rows"] = [{"where": name} | part.figures() for name, part in zip(where, sums, strict=True)]
    return report


def score_prompts(
    loaded: "Loaded",
    prompts: Sequence[tuple[str, Prompt]],
    *,
    max_new_tokens: int,
    chat: "ChatTemplate | None" = None,
    batch_size: int = 8,
    rows: bool = False,
) -> dict[str, Any]:
    """The mean scores (`maxi.scores`) of a model's greedy completions of (where, prompt), and how many `prompts` there were.

    With `chat` texts are what a user says; messages need it. With `rows` also `generations`, a list of {where, prompt,
    text, tokens} and the scores of each, in order. Raises as `maxi.generation.complete` does, ConfigError for a batch_size
    below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}", "eval", "it must be at least 1")
    asked = [(where, conversation(prompt) if chat and isinstance(prompt, str) else prompt) for where, prompt in prompts]
    ids = [ids_of(loaded, prompt, chat, where) for where, prompt in asked]
    fast, sampling, made = unstacked(loaded), Sampling(max_new_tokens=max_new_tokens), []
    for first in range(0, len(prompts), batch_size):
        made += complete(fast, ids[first : first + batch_size], sampling, chat=chat)
    report: dict[str, Any] = {"prompts": len(prompts), "max_new_tokens": max_new_tokens}
    report |= scores.summary((completion.ids, completion.stopped) for completion in made)
    if rows:
        report["generations"] = [
            {"where": where, "prompt": prompt, "text": one.text, "tokens": len(one.ids)} | scores.score(one.ids, one.stopped)
            for (where, prompt), one in zip(prompts, made, strict=True)
        ]
    return report


def table(report: dict[str, Any]) -> str:
    """A report of `evaluate` or `score_prompts`, or both, as plain text: the rows, if it has them, then the whole."""
    documents = _documents(report) if "loss" in report else ()
    return "\n".join([*documents, *(_generations(report) if "prompts" in report else ())])


def _documents(report: dict[str, Any]) -> Iterator[str]:
    if "rows" in report:
        yield f"{'loss':>9} {'perplexity':>12} {'bits/byte':>9} {'tokens':>9}  document"
        yield from ("{} {} {} {:>9,}  {}".format(*_shown(row), row["tokens"], row["where"]) for row in report["rows"])
        yield ""
    loss, perplexity, bits = (text.strip() for text in _shown(report))
    size = "" if report["bytes"] is None else f", {report['bytes']:,} bytes"
    yield f"loss           {loss} nats per token"
    yield f"perplexity     {perplexity}"
    yield f"bits per byte  {bits}"
    yield f"tokens         {report['tokens']:,} predicted in {report['documents']:,} documents{size}"
    yield f"time           {report['seconds']:.1f} s, {report['tokens_per_s']:,.0f} tokens/s"


def _generations(report: dict[str, Any]) -> Iterator[str]:
    for row in report.get("generations", ()):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1].get("content")
        ended = "stopped" if row["stopped"] else "cut"
        repeats = f"repeated 4-grams {row['repeated_4grams']:.4f}, longest loop {row['longest_loop']:.0f}"
        yield f"--- {row['where']}: {row['tokens']:,} tokens, {ended}, {repeats}"
        yield visible(f"{prompt}\n--> {row['text']}\n")
    yield f"repeated 4-grams  {report['repeated_4grams']:.4f} of all 4-grams"
    yield f"distinct          {report['distinct_1']:.4f} of tokens, {report['distinct_2']:.4f} of pairs"
    yield f"longest loop      {report['longest_loop']:.1f} tokens"
    yield f"stopped           {report['stopped']:.4f} of {report['prompts']:,} within {report['max_new_tokens']:,} tokens"


def run_eval(
    model_path: str | Path,
    paths: Sequence[str] = (),
    *,
    field: str = "text",
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 256,
    json_out: str | Path | None = None,
    rows: bool = False,
    seq_len: int | None = None,
    batch_size: int = 8,
    out: TextIO,
) -> None:
    """`maxi eval`: the table to `out`, and the report as JSON to `json_out`, written whole or not at all.

    Documents of `paths` are measured, `prompts` and those of `prompts_file` completed and scored. Raises as `open_model`,
    `evaluate`, `maxi.data.prompts.read` and `score_prompts` do, ConfigError when there is nothing to do, for `chat` without
    prompts or without a template, and when `json_out` cannot be written.
    """
    if json_out is not None and not Path(json_out).expanduser().parent.is_dir():
        raise ConfigError("the folder of --json does not exist", str(json_out), "create it first")
    asked: list[tuple[str, Prompt]] = [(f"--prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)]
    if prompts_file is not None:
        asked += prompt_files.read(prompts_file)
    if not paths and not asked:
        raise ConfigError("there is nothing to evaluate", "eval", "give --data, --prompt or --prompts")
    if chat and not asked:
        raise ConfigError("--chat is about prompts", "eval", "give --prompt or --prompts")
    loaded = open_model(model_path)
    report: dict[str, Any] = {}
    if paths:
        report |= evaluate(loaded, paths, field=field, seq_len=seq_len, batch_size=batch_size, rows=rows)
    if asked:
        with open_chat(loaded) if chat else nullcontext() as template:
            report |= score_prompts(
                loaded, asked, max_new_tokens=max_new_tokens, chat=template, batch_size=batch_size, rows=rows
            )
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


def _bytes_of(targets: np.ndarray, token_bytes: np.ndarray | None) -> np.ndarray | None:
    return None if token_bytes is None else token_bytes[targets].astype(np.float64)


def _ahead(
    step_fn: Callable[[Tree, Any], T], params: Tree, batches: Iterable[Batch], place: Callable[[Batch], Any] | None
) -> Iterator[tuple[Batch, T]]:
    """(batch, what `step_fn` made of it); the device works on the next batch while the caller looks at one."""
    waiting: tuple[Batch, T] | None = None
    for batch in batches:
        started = batch, step_fn(params, place(batch) if place else {k: jnp.asarray(v) for k, v in batch.items()})
        if waiting:
            yield waiting
        waiting = started
    if waiting:
        yield waiting


def _count(sums: list[_Sums], batch: Batch, nats_BT: np.ndarray, token_bytes: np.ndarray | None) -> None:
    """Adds a batch's predictions to the sums of their documents."""
    order = np.argsort(batch["documents"], axis=None, kind="stable")
    documents, nats, targets = (array.ravel()[order] for array in (batch["documents"], nats_BT, batch["targets"]))
    numbers, starts = np.unique(documents, return_index=True)
    for number, start, stop in zip(numbers, starts, [*starts[1:], len(documents)], strict=True):
        if number >= 0:
            part = slice(start, stop)
            sums[number].add(nats[part], np.ones(stop - start), _bytes_of(targets[part], token_bytes))

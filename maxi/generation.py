"""Text and tokens from a model: greedy or sampled, batched, one token at a time; and its logits.

    prefill   the prompts go through the layers together, padded on the right to a shared width
    decode    one compiled step a token; the key/value cache is donated, so it is updated in place
    choose    the next token of each row (`models/sampling.py`)

What a token sees is decided by positions and segments (see `decoder.Cache`), so prompts of different lengths share
a batch, the new tokens of all rows go into the same slot, and a row's tokens do not depend on the rows beside it.
Lengths are rounded up, so that few shapes are ever compiled. `stream_tokens` knows no text.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from maxi.errors import ConfigError, ModelFolderError, NumericsError
from maxi.models import Model, decoder
from maxi.models.decoder import Cache, Compute
from maxi.models.sampling import NOT_FINITE, NOTHING, Sampling, choose, row_keys
from maxi.params import Tree
from maxi.pretrained import open_model
from maxi.sharding import data_shards

if TYPE_CHECKING:
    from maxi.data.tokenizer import Tokenizer
    from maxi.hf import Loaded

log = logging.getLogger("maxi")

PREFILL_CHUNK = 512
"""Prompt tokens that go through the layers together: bounds the memory that attention takes in long prompts."""
MIN_WIDTH = 16
"""Shorter prompts are padded to this."""
CACHE_STEP = 128
"""The cache's length is a multiple of this many slots."""

_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Same:
    """A model as a key of `jax.jit`'s cache, equal to itself alone (a `Model` holds dicts, which do not hash)."""

    def __init__(self, model: Model):
        self.model = model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.model is self.model


class _Rows(NamedTuple):
    """Where each row stands: the token chosen last, its position, and whether it was the last of all.

    `slot` is where in the cache the tokens go; `seen_BV` is kept only for a repetition penalty.
    """

    tokens_B: Any
    positions_B: Any
    done_B: Any
    slot: Any
    keys_B: jax.Array
    seen_BV: Any


def generate(
    loaded: "Loaded",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    compute: Compute | None = None,
    **settings: Any,
) -> list[str]:
    """The continuation of each prompt, without the prompt and without special tokens.

    `settings` are the other fields of `maxi.models.sampling.Sampling` (temperature, top_k, ..., seed); the default is
    greedy. All prompts run as one batch, until each has met an end-of-sequence token or has `max_new_tokens`. Raises
    ConfigError for a prompt without tokens or a setting out of range, ModelFolderError when there is no tokenizer.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, **settings)
    texts = dict(_finished(loaded, prompts, sampling, compute))
    return [texts[row] for row in range(len(prompts))]


def stream_text(loaded: "Loaded", prompt: str, sampling: Sampling, compute: Compute | None = None) -> Iterator[str]:
    """The continuation of one prompt as it grows, in pieces of whole characters; raises as `generate` does."""
    tokenizer = _tokenizer(loaded)
    tokens = _stream_of(loaded, [prompt], sampling, compute)
    ids = (int(tokens_B[0]) for tokens_B in tokens if tokens_B[0] not in tokenizer.eos_ids)
    return tokenizer.stream(ids, skip_special_tokens=True)


def logits(loaded: "Loaded", tokens: Sequence[Sequence[int]], compute: Compute | None = None) -> np.ndarray:
    """Float32 logits [B, T, V] of B sequences of T token ids each: [b, t] scores what follows tokens[b][: t + 1].

    `compute` defaults to the weights' dtype. Raises ConfigError for no tokens, rows of different lengths, or an id
    outside the vocabulary.
    """
    model, params = loaded.model, loaded.params
    _check_ids(model, tokens)
    if len(lengths := sorted({len(row) for row in tokens})) > 1:
        raise ConfigError(f"rows of {lengths[0]} to {lengths[-1]} tokens", "logits", "give rows of equal length")
    T = lengths[0]
    tokens_BT = np.zeros((len(tokens), _width(T)), np.int32)
    tokens_BT[:, :T] = tokens
    compute = compute or Compute(dtype=params["embed"].dtype)
    return np.asarray(_logits(Same(model), compute, params, tokens_BT, np.int32(T)))[:, :T]


def stream_tokens(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int] = (),
    compute: Compute | None = None,
) -> Iterator[np.ndarray]:
    """Yields the next token of each prompt, int32 [B], until all have ended or `sampling.max_new_tokens` are made.

    A row ends with an id of `eos_ids`, which is yielded, and yields -1 from then on. `params` as the table lays them
    out, or from `decoder.unstack` (which saves a copy a call). `compute` defaults to the weights' dtype. Under a mesh
    the rows are split like a batch. Raises ConfigError for no prompt, an empty one, or an id outside the vocabulary,
    NumericsError when logits are not finite; warns when positions go beyond what the model was made for.
    """
    _check_ids(model, prompts)
    longest = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    if longest > model.rope.max_position:
        log.warning(
            "generate: up to %d tokens, but the model's max_position_embeddings is %d; text may degrade beyond",
            *(longest, model.rope.max_position),
        )
    compute = compute or Compute(dtype=params["embed"].dtype)
    if not all(isinstance(params[stack], tuple) for stack in model.table.stacks):
        params = decoder.unstack(model, params, compute.dtype)
    return _stream(model, params, prompts, sampling, tuple(eos_ids), compute)


def run_generate(model_path: str | Path, prompts: Sequence[str], sampling: Sampling, *, out: TextIO) -> None:
    """`maxi generate`: prompt and continuation of MODEL to `out`; one prompt as it comes, several in order when done.

    Control characters other than tab and newline are written as \\x1b and the like: a model's text must not steer
    the terminal. Raises as `open_model` and `generate` do.
    """
    loaded = open_model(model_path)
    if len(prompts) == 1:
        pieces = stream_text(loaded, prompts[0], sampling)
        out.write(prompts[0].translate(_VISIBLE))
        for piece in pieces:
            out.write(piece.translate(_VISIBLE))
            out.flush()
        out.write("\n")
        return
    waiting: dict[int, str] = {}
    shown = 0
    for row, text in _finished(loaded, prompts, sampling):
        waiting[row] = text
        while shown in waiting:
            whole = (prompts[shown] + waiting.pop(shown)).translate(_VISIBLE)
            out.write(f"--- {shown + 1} of {len(prompts)}\n{whole}\n")
            out.flush()
            shown += 1


def _tokenizer(loaded: "Loaded") -> "Tokenizer":
    if loaded.tokenizer is None:
        raise ModelFolderError("the model's folder has no tokenizer", str(loaded.folder), "put tokenizer.json there")
    return loaded.tokenizer


def _stream_of(loaded: "Loaded", prompts: Sequence[str], sampling: Sampling, compute: Compute | None) -> Iterator[np.ndarray]:
    tokenizer = _tokenizer(loaded)
    ids = [encoded.tolist() for encoded in tokenizer.encode(prompts)]
    return stream_tokens(loaded.model, loaded.params, ids, sampling, tokenizer.eos_ids, compute)


def _finished(
    loaded: "Loaded", prompts: Sequence[str], sampling: Sampling, compute: Compute | None = None
) -> Iterator[tuple[int, str]]:
    """(number of the prompt, its continuation) as each is finished."""
    tokenizer, made = _tokenizer(loaded), [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for tokens_B in _stream_of(loaded, prompts, sampling, compute):
        for row in sorted(open_rows):
            if tokens_B[row] not in tokenizer.eos_ids:
                made[row].append(int(tokens_B[row]))
                continue
            open_rows.remove(row)
            yield row, tokenizer.decode(made[row], skip_special_tokens=True)
    for row in sorted(open_rows):
        yield row, tokenizer.decode(made[row], skip_special_tokens=True)


def _check_ids(model: Model, rows: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError unless there are rows, none is empty, and all ids are in the vocabulary."""
    if not len(rows):
        raise ConfigError("there is nothing to continue", "prompts", "give at least one")
    for number, row in enumerate(rows):
        if not len(row):
            raise ConfigError(f"prompt {number + 1} has no tokens", "prompts", "give it some text")
        if min(row) < 0 or max(row) >= model.vocab_size:
            what = f"prompt {number + 1} has a token id outside the model's vocabulary of {model.vocab_size}"
            raise ConfigError(what, "prompts", "use the tokenizer that belongs to the model")


def _stream(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    compute: Compute,
) -> Iterator[np.ndarray]:
    count = len(prompts)
    how = dataclasses.replace(sampling, seed=0, max_new_tokens=1)  # what a compiled `_choose` depends on
    logits_BV, cache, rows = _start(model, params, prompts, sampling, compute)
    for left in range(sampling.max_new_tokens, 0, -1):
        rows = chosen = _choose(how, eos_ids, logits_BV, rows)
        if left > 1:  # started before the tokens are looked at, so that the device works while the caller does
            logits_BV, cache, rows = _step(Same(model), compute, params, cache, rows)
        tokens_B = np.asarray(chosen.tokens_B)[:count]
        if (tokens_B == NOT_FINITE).any():
            raise NumericsError("the model's logits are not finite", "generate", "its weights are damaged or diverged")
        yield tokens_B
        if np.isin(tokens_B, (NOTHING, *eos_ids)).all():
            return


def _start(
    model: Model, params: Tree, prompts: Sequence[Sequence[int]], sampling: Sampling, compute: Compute
) -> tuple[jax.Array, Cache, _Rows]:
    """Logits [B, V] after the prompts, the filled cache, and the rows before their first token."""
    count, shards = len(prompts), data_shards()
    B = -(-count // shards) * shards  # rows beyond `count` only fill the mesh
    lengths_B = np.array([len(prompt) for prompt in prompts] + [1] * (B - count), np.int32)
    width = _width(int(lengths_B.max()))
    tokens_BT = np.zeros((B, width), np.int32)
    seen_BV = np.zeros((B, model.vocab_size), bool) if sampling.repetition_penalty != 1 else None
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        if seen_BV is not None:
            seen_BV[row, list(prompt)] = True
    slots = -(-(width + sampling.max_new_tokens) // CACHE_STEP) * CACHE_STEP
    cache = decoder.empty_cache(model, B, slots, compute.dtype)
    # dynamic NTK turns every key by the length of the whole prompt, which a first chunk would not know
    chunk = width if model.rope.kind == "dynamic" else min(width, PREFILL_CHUNK)
    logits_BV = jnp.zeros((B, model.vocab_size), jnp.float32)
    for first in range(0, width, chunk):
        tokens = tokens_BT[:, first : first + chunk]
        logits_BV, cache = _prefill(Same(model), compute, params, cache, tokens, lengths_B, np.int32(first), logits_BV)
    done_B = np.arange(B) >= count
    rows = _Rows(np.zeros(B, np.int32), lengths_B, done_B, np.int32(width), row_keys(sampling.seed, B), seen_BV)
    return logits_BV, cache, rows


def _width(length: int) -> int:
    """The next power of two up to PREFILL_CHUNK, then the next multiple of it."""
    if length > PREFILL_CHUNK:
        return -(-length // PREFILL_CHUNK) * PREFILL_CHUNK
    return max(MIN_WIDTH, 1 << (length - 1).bit_length())


def _places(first: Any, lengths_B: Any, T: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments int32 [B, T] of slots [first, first + T) of rows padded on the right."""
    slots_BT = first + jnp.arange(T, dtype=jnp.int32)[None]
    real_BT = slots_BT < lengths_B[:, None]
    return jnp.where(real_BT, slots_BT, 0), real_BT.astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _prefill(same, compute, params, cache, tokens_BT, lengths_B, first, logits_BV) -> tuple[jax.Array, Cache]:
    """Tokens [first, first + T) of the prompts into the cache; new logits [B, V] for the rows that end among them."""
    T = tokens_BT.shape[1]
    places = _places(first, lengths_B, T)
    h_BTD, cache = decoder.hidden_with_cache(same.model, params, tokens_BT, *places, cache, first, compute)
    last_B = lengths_B - 1 - first
    h_BTD = jnp.take_along_axis(h_BTD, jnp.clip(last_B, 0, T - 1)[:, None, None], axis=1)
    ends_B = (last_B >= 0) & (last_B < T)
    return jnp.where(ends_B[:, None], decoder.logits(params, h_BTD, compute)[:, 0], logits_BV), cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(same, compute, params, cache, rows) -> tuple[jax.Array, Cache, _Rows]:
    """Logits [B, V] after the rows' tokens, the cache with them, and the rows one position on."""
    tokens_BT, positions_BT = jnp.maximum(rows.tokens_B, 0)[:, None], rows.positions_B[:, None]
    segments_BT = jnp.ones_like(tokens_BT)
    h_BTD, cache = decoder.hidden_with_cache(
        same.model, params, tokens_BT, positions_BT, segments_BT, cache, rows.slot, compute
    )
    rows = rows._replace(positions_B=rows.positions_B + 1, slot=rows.slot + 1)
    return decoder.logits(params, h_BTD, compute)[:, 0], cache, rows


@partial(jax.jit, static_argnums=(0, 1))
def _choose(how: Sampling, eos_ids: tuple[int, ...], logits_BV, rows) -> _Rows:
    """The rows with their next tokens."""
    tokens_B = choose(logits_BV, rows.seen_BV, rows.keys_B, rows.positions_B, how)
    tokens_B = jnp.where(rows.done_B, NOTHING, tokens_B)
    seen_BV = rows.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), jnp.maximum(tokens_B, 0)].set(True)
    ended_B = (tokens_B[:, None] == jnp.asarray(eos_ids, jnp.int32)).any(-1)
    return rows._replace(tokens_B=tokens_B, done_B=rows.done_B | ended_B, seen_BV=seen_BV)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(same, compute, params, tokens_BT, length) -> jax.Array:
    lengths_B = jnp.full(len(tokens_BT), length)
    positions_BT, segments_BT = _places(0, lengths_B, tokens_BT.shape[1])
    h_BTD = decoder.hidden(same.model, params, tokens_BT, positions_BT, segments_BT, compute)
    return decoder.logits(params, h_BTD, compute)

"""Text and tokens from a model: greedy or sampled, batched, one token at a time; and its logits.

    prefill   the prompts go through the layers together, padded on the right to a shared width
    decode    one compiled step a token; the key/value cache is donated, so it is updated in place
    choose    the next token of each row (`models/sampling.py`)

What a token sees is decided by positions and segments (see `decoder.Cache`), so prompts of different lengths share
a batch, the new tokens of all rows go into the same slot, and a row's tokens do not depend on the rows beside it.
A model with virtual tokens reads them before every prompt. Lengths are rounded up, so that few shapes are ever compiled.
`stream_tokens` knows no text.

What is continued is a text, ids, or a conversation that a chat template renders. The terminal is `chat.py`'s matter.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxi.adapters import virtual
from maxi.errors import ConfigError, ModelFolderError, NumericsError
from maxi.models import Model, decoder
from maxi.models.decoder import Cache, Compute
from maxi.models.sampling import NOT_FINITE, NOTHING, Sampling, choose, row_keys
from maxi.params import Tree
from maxi.sharding import fetch, shards

if TYPE_CHECKING:
    from maxi.data.chat_template import ChatTemplate
    from maxi.data.tokenizer import Tokenizer
    from maxi.hf import Loaded

log = logging.getLogger("maxi")

PREFILL_CHUNK = 512
"""Prompt tokens that go through the layers together: bounds the memory that attention takes in long prompts."""
MIN_WIDTH = 16
"""Shorter prompts are padded to this."""
CACHE_STEP = 128
"""The cache's length is a multiple of this many slots."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, its ids, or the messages of a conversation, which take a chat template."""

_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Completion(NamedTuple):
    """What a model said to a prompt: its text without special tokens, its ids without the one that ended it, and
    whether one did (`stopped`) or the length limit came first."""

    text: str
    ids: list[int]
    stopped: bool


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


def complete(
    loaded: "Loaded",
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    chat: "ChatTemplate | None" = None,
    compute: Compute | None = None,
) -> list[Completion]:
    """The completion of each prompt, all run as one batch until each has ended or has `sampling.max_new_tokens`.

    Completions end at `tokenizer.eos_ids` and, given `chat`, at the token that ends its turns; `chat` renders the prompts
    that are messages. Raises ConfigError for a prompt without tokens or messages without `chat`, DataError where the
    template refuses a conversation, ModelFolderError when there is no tokenizer, and as `stream_tokens` does.
    """
    made = dict(complete_each(loaded, prompts, sampling, chat=chat, compute=compute))
    return [made[row] for row in range(len(prompts))]


def complete_each(
    loaded: "Loaded",
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    chat: "ChatTemplate | None" = None,
    compute: Compute | None = None,
) -> Iterator[tuple[int, Completion]]:
    """(number of the prompt, its completion) as each is finished; otherwise as `complete`."""
    tokenizer, made = tokenizer_of(loaded), [[] for _ in prompts]
    tokens, ends = _stream_of(loaded, prompts, sampling, chat, compute)
    unfinished = set(range(len(prompts)))
    for tokens_B in tokens:
        for row in sorted(unfinished):
            if tokens_B[row] not in ends:
                made[row].append(int(tokens_B[row]))
                continue
            unfinished.remove(row)
            yield row, Completion(tokenizer.decode(made[row], skip_special_tokens=True), made[row], True)
    for row in sorted(unfinished):
        yield row, Completion(tokenizer.decode(made[row], skip_special_tokens=True), made[row], False)


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
    return [made.text for made in complete(loaded, prompts, sampling, compute=compute)]


def stream_ids(
    loaded: "Loaded",
    prompt: Prompt,
    sampling: Sampling,
    *,
    chat: "ChatTemplate | None" = None,
    compute: Compute | None = None,
) -> Iterator[int]:
    """The ids of one prompt's completion as they are made, without the one that ends it; raises as `complete` does."""
    tokens, ends = _stream_of(loaded, [prompt], sampling, chat, compute)
    return (int(tokens_B[0]) for tokens_B in tokens if tokens_B[0] not in ends)


def stream_text(
    loaded: "Loaded",
    prompt: Prompt,
    sampling: Sampling,
    *,
    chat: "ChatTemplate | None" = None,
    compute: Compute | None = None,
) -> Iterator[str]:
    """The text of one prompt's completion as it grows, in pieces of whole characters; raises as `complete` does."""
    ids = stream_ids(loaded, prompt, sampling, chat=chat, compute=compute)
    return tokenizer_of(loaded).stream(ids, skip_special_tokens=True)


def logits(loaded: "Loaded", tokens: Sequence[Sequence[int]], compute: Compute | None = None) -> np.ndarray:
    """Float32 logits [B, T, V] of B sequences of T token ids each: [b, t] scores what follows tokens[b][: t + 1].

    `compute` defaults to the weights' dtype. Raises ConfigError for no tokens, rows of different lengths, or an id
    outside the vocabulary.
    """
    model, params = loaded.model, loaded.params
    _check_ids(model, tokens)
    if len(lengths := sorted({len(row) for row in tokens})) > 1:
        raise ConfigError(f"rows of {lengths[0]} to {lengths[-1]} tokens", "logits", "give rows of equal length")
    before = virtual.count(params)
    T = before + lengths[0]
    tokens_BT = np.zeros((len(tokens), _width(T)), np.int32)
    tokens_BT[:, before:T] = tokens
    compute = compute or Compute(dtype=params["embed"].dtype)
    return np.asarray(_logits(Same(model), compute, params, tokens_BT, np.int32(T)))[:, before:T]


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
    longest = virtual.count(params) + max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    if longest > model.rope.max_position:
        log.warning(
            "generate: up to %d tokens, but the model's max_position_embeddings is %d; text may degrade beyond",
            *(longest, model.rope.max_position),
        )
    compute = compute or Compute(dtype=params["embed"].dtype)
    if not all(isinstance(params[stack], tuple) for stack in model.table.stacks):
        params = decoder.unstack(model, params, compute.dtype)
    return _stream(model, params, prompts, sampling, tuple(eos_ids), compute)


def unstacked(loaded: "Loaded") -> "Loaded":
    """The same with its weights laid out for decoding, which spares every call a copy of them."""
    params = decoder.unstack(loaded.model, loaded.params, loaded.params["embed"].dtype)
    return dataclasses.replace(loaded, params=params)


def open_chat(loaded: "Loaded") -> "ChatTemplate":
    """The chat template of a model's folder, to be closed. Raises ConfigError when it has none."""
    from maxi.data.chat_template import ChatTemplate

    return ChatTemplate(tokenizer_of(loaded))


def conversation(prompt: str, system: str | None = None) -> list[dict[str, Any]]:
    """The messages of a conversation in which a user has said `prompt`, and nobody anything else."""
    instructions = [] if system is None else [{"role": "system", "content": system}]
    return [*instructions, {"role": "user", "content": prompt}]


def ids_of(loaded: "Loaded", prompt: Prompt, chat: "ChatTemplate | None", where: str) -> Sequence[int]:
    """The ids of a prompt, which `where` names in errors; raises as `complete` does."""
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], Mapping):
        if chat is None:
            raise ConfigError("a conversation needs a chat template", where, "pass --chat, or chat in Python")
        prompt = chat.prompt(prompt, where=where)  # type: ignore[arg-type]
    if not isinstance(prompt, str):
        return prompt  # type: ignore[return-value]
    try:
        prompt.encode()
    except UnicodeEncodeError:  # lone surrogates, as the shell hands over bytes that are not UTF-8
        raise ConfigError("the text is not UTF-8", where, "write it as UTF-8") from None
    return tokenizer_of(loaded).encode([prompt])[0].tolist()


def visible(text: str) -> str:
    """Control characters other than tab and newline as \\x1b and the like: a model's text must not steer the terminal."""
    return text.translate(_VISIBLE)


def tokenizer_of(loaded: "Loaded") -> "Tokenizer":
    """Raises ModelFolderError when there is none, ConfigError when it has ids that the model does not know."""
    if loaded.tokenizer is None:
        raise ModelFolderError("the model's folder has no tokenizer", str(loaded.folder), "put tokenizer.json there")
    if loaded.tokenizer.vocab_size > loaded.model.vocab_size:
        what = f"the tokenizer has {loaded.tokenizer.vocab_size:,} ids but the model {loaded.model.vocab_size:,}"
        raise ConfigError(what, str(loaded.folder), "take the model's own tokenizer")
    return loaded.tokenizer


def _stream_of(
    loaded: "Loaded", prompts: Sequence[Prompt], sampling: Sampling, chat: "ChatTemplate | None", compute: Compute | None
) -> tuple[Iterator[np.ndarray], tuple[int, ...]]:
    """What `stream_tokens` yields, and the ids that end a row."""
    tokenizer = tokenizer_of(loaded)
    ends = tuple(sorted({*tokenizer.eos_ids, *(() if chat is None else (chat.end_token_id,))}))
    ids = [ids_of(loaded, prompt, chat, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    return stream_tokens(loaded.model, loaded.params, ids, sampling, ends, compute), ends


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
        tokens_B = fetch(chosen.tokens_B)[:count]
        if (tokens_B == NOT_FINITE).any():
            raise NumericsError("the model's logits are not finite", "generate", "its weights are damaged or diverged")
        yield tokens_B
        if np.isin(tokens_B, (NOTHING, *eos_ids)).all():
            return


def _start(
    model: Model, params: Tree, prompts: Sequence[Sequence[int]], sampling: Sampling, compute: Compute
) -> tuple[jax.Array, Cache, _Rows]:
    """Logits [B, V] after the prompts, the filled cache, and the rows before their first token."""
    count, parts, before = len(prompts), shards("B"), virtual.count(params)
    B = -(-count // parts) * parts  # rows beyond `count` only fill the mesh
    lengths_B = np.array([before + len(prompt) for prompt in prompts] + [1] * (B - count), np.int32)
    width = _width(int(lengths_B.max()))
    tokens_BT = np.zeros((B, width), np.int32)
    seen_BV = np.zeros((B, model.vocab_size), bool) if sampling.repetition_penalty != 1 else None
    for row, prompt in enumerate(prompts):
        tokens_BT[row, before : lengths_B[row]] = prompt
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

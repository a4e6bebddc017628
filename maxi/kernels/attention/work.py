"""What a block-wise kernel has to do on packed rows: the list of (query block, key block) pairs in which anything is seen.

A pair is listed when some query of the one sees some key of the other, row by row, so a row packed with short documents
costs its documents and not its square. Lists are made in XLA from `Spans`, once a step, have a run-time length, and go
to the kernel as scalars. One entry is two int32:

    place   row << 16 | query block
    step    written key block << 19 | key block << 8 | flags

The written key block is the one whose sums are next complete: the block that the kernel's output stands on meanwhile.

Rows that break the contract of `maxi.kernels.attention`, from which `Spans` follow, are found here too (`broken`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxi.kernels.attention.spans import Spans

FIRST, LAST, SEEN, BROKEN = 1, 2, 4, 8
"""Flags of an entry: begins and ends its group (what one output block is accumulated over), has something to see, and
its row breaks the contract. A group with nothing to see has one entry, so that its output is written."""
CHUNK_FIRST, CHUNK_LAST, RESUMES, PAUSES = 16, 32, 64, 128
"""And of an entry ordered by key block: begins and ends a chunk of queries, and its key block has been there in an earlier
chunk or comes again in a later one."""


_BLOCKS = 0x7FF
"""Key blocks have 11 bits: more could never be listed."""


def row(place: jax.Array) -> jax.Array:
    return place >> 16


def query_block(place: jax.Array) -> jax.Array:
    return place & 0xFFFF


def key_block(step: jax.Array) -> jax.Array:
    return step >> 8 & _BLOCKS


def written(step: jax.Array) -> jax.Array:
    return step >> 19


class Work(NamedTuple):
    """Entries [any number, at least `size`] in the kernel's order; `size` counts those that are to be done."""

    place: jax.Array
    step: jax.Array
    size: jax.Array


def seen_blocks(seen: Spans, q_block: int, k_block: int) -> jax.Array:
    """Boolean [B, T / q_block, T / k_block]: does any query of the block see any key of the other."""
    B, T = seen.first.shape
    begin = jnp.arange(0, T, k_block, dtype=jnp.int32)
    end = begin + (k_block - 1)
    last = jnp.arange(T, dtype=jnp.int32)[None, :, None]
    meets = (seen.first[..., None] <= end) & (last >= begin)
    if seen.context_first is not None and seen.context_last is not None:
        meets |= (seen.context_first[..., None] <= end) & (seen.context_last[..., None] >= begin)
    return meets.reshape(B, T // q_block, q_block, T // k_block).any(2)


def most(T: int, q_block: int, k_block: int) -> int:
    """The most entries that one row can ask for: all that causality leaves, and one for every key block left out."""
    return sum(((i + 1) * q_block - 1) // k_block + 1 for i in range(T // q_block)) + T // k_block


def _listed(wanted: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The flat places that are wanted, ascending and then anything, [length]; and how many they are."""
    count = wanted.size
    place = jnp.arange(count, dtype=jnp.int32)
    order = jnp.sort(jnp.where(wanted.reshape(-1), place, place + count))
    size = wanted.sum(dtype=jnp.int32)
    return jnp.pad(order, (0, max(0, length - count)))[:length] % count, size


def _changes(group: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a run of equal numbers begins and where it ends, the list being `size` long."""
    place = jnp.arange(group.size)
    differs = group[1:] != group[:-1]
    begins = jnp.concatenate([jnp.ones(1, bool), differs])
    return begins, jnp.concatenate([differs, jnp.ones(1, bool)]) | (place == size - 1)


def by_query(meets: jax.Array, faults: jax.Array, length: int) -> Work:
    """Ordered by row, query block, key block; a group is a query block. `faults` [B] are the rows that break the contract."""
    _, count_q, count_k = meets.shape
    wanted = meets.at[:, :, 0].set(meets[:, :, 0] | ~meets.any(2))
    at, size = _listed(wanted, length)
    group, k_block = at // count_k, at % count_k
    row, q_block = group // count_q, group % count_q
    begins, ends = _changes(group, size)
    flags = FIRST * begins + LAST * ends + SEEN * meets.reshape(-1)[at] + BROKEN * faults[row]
    return Work(row << 16 | q_block, k_block << 8 | flags.astype(jnp.int32), size)


def by_key(meets: jax.Array, chunk: int, length: int) -> Work:
    """Ordered by row, chunk of `chunk` query blocks, key block, query block; a group is a key block within a chunk."""
    B, count_q, count_k = meets.shape
    chunks = count_q // chunk
    seen = meets.reshape(B, chunks, chunk, count_k).transpose(0, 1, 3, 2)
    in_chunk = seen.any(3)  # [row, chunk, key block]
    # a key block that nothing sees is listed once, in the chunk where it stands: so every chunk lists something
    home = jnp.arange(count_k) * chunks // count_k == jnp.arange(chunks)[:, None]
    idle = home & ~in_chunk.any(1, keepdims=True)
    at, size = _listed(seen.at[..., 0].set(seen[..., 0] | idle), length)
    group, block = at // chunk, at % chunk
    k_block, part = group % count_k, group // count_k
    row, q_block = part // chunks, part % chunks * chunk + block
    before = jnp.cumsum(in_chunk, 1) - in_chunk
    after = in_chunk.sum(1, keepdims=True) - before - in_chunk
    (begins, ends), (chunk_begins, chunk_ends) = _changes(group, size), _changes(part, size)
    flags = FIRST * begins + LAST * ends + SEEN * seen.reshape(-1)[at]
    flags += CHUNK_FIRST * chunk_begins + CHUNK_LAST * chunk_ends
    paused = after.reshape(-1)[group] > 0
    flags += RESUMES * (before.reshape(-1)[group] > 0) + PAUSES * paused
    entries = jnp.arange(length)
    complete = jnp.where(ends & ~paused & (entries < size), entries, length - 1)
    written = k_block[jax.lax.cummin(complete, reverse=True)]
    return Work(row << 16 | q_block, written << 19 | k_block << 8 | flags.astype(jnp.int32), size)


def broken(positions_BT: jax.Array, segments_BT: jax.Array, contexts_BT: jax.Array | None, seen: Spans) -> jax.Array:
    """Boolean [B]: rows in which `Spans` would not mean what the definition of attention says.

    A segment in two pieces, positions that do not ascend by one within one, a context that stands or counts after what
    sees it.
    """
    T = segments_BT.shape[1]
    place = jnp.arange(T, dtype=jnp.int32)
    real = segments_BT != 0
    inside = segments_BT[:, 1:] == segments_BT[:, :-1]
    wrong = (inside & real[:, 1:] & (positions_BT[:, 1:] != positions_BT[:, :-1] + 1)).any(1)
    # every run once, by its number, and 0 for all other tokens: two equal neighbours are two runs
    begins = jnp.pad(~inside, ((0, 0), (1, 0)), constant_values=True) & real
    numbers = jnp.sort(jnp.where(begins, segments_BT, 0), axis=1)
    wrong |= ((numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != 0)).any(1)
    if contexts_BT is None or seen.context_last is None:
        return wrong
    begin = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    has = (contexts_BT != 0) & real & (seen.context_last >= 0)
    last = jnp.take_along_axis(positions_BT, jnp.maximum(seen.context_last, 0), 1)
    return wrong | (has & ((seen.context_last >= begin) | (last >= positions_BT))).any(1)

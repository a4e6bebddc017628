"""Flash attention for GPUs: Pallas kernels by way of Triton, forward and backward, that skip keys by document.

The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691, algorithms 1 and 2): a program holds one block of queries,
walks over blocks of keys and keeps a running softmax; the backward pass recomputes probabilities from the saved
log-normaliser. What differs is the walk. A block of queries sees by the contract of training rows two ranges of keys
(`spans.py`): its own segments up to itself, and its contexts. `prepare` finds both for every block once a step, and the
kernels walk over nothing else, so a row costs its documents and not T squared.

The backward pass is two kernels, one a block of queries (dq) and one a block of keys (dk, dv): seven matmuls a tile
instead of the five of one kernel, but that one would add its dq up with atomics, in an order that changes from run to
run, or in one partial sum a block of keys, which grows with T squared. The second kernel takes all queries of a key
head itself, so grouped heads repeat no keys and leave no partial sums either.

Arrays stay as they are, [B, T, N, H]: where T or H does not fill a block, loads and stores are masked, nothing is padded
or transposed in memory.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from maxi import sharding
from maxi.kernels import platform
from maxi.kernels.attention.reference import MASKED
from maxi.kernels.attention.spans import NEVER, Spans, pad, spans
from maxi.kernels.attention.work import broken

FLOOR = 0.5 * MASKED
"""The running maximum begins here, above every masked score and below every other: what is masked weighs exp(-inf)."""

FAULT = -1
"""Stands for a walk of a row that breaks the contract: its values come out as NaN, and not by another mask."""

DTYPES = ("bfloat16", "float16", "float32")
PLAIN, TRANSPOSED = ((1,), (0,)), ((1,), (1,))
"""What a @ b and a @ b.T contract."""
LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """One kernel's block of queries and block of keys, and Triton's warps and stages for it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dkv: Tile


# By bytes an element and head_dim. Not measured on hardware: chosen by what `make gpu-compile` (tests/peers) tells of
# sm_90a, few instructions a score and no spilled registers (16/8 heads of 128 with contexts: 32 bytes in dkv), in the
# shared memory that chips from compute capability 8.6 on have, 99 KiB. Compiled for sm_80 two of them spill, 136 bytes at
# most.
TILES = {
    (2, 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 128): Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (2, 256): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 64): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 128): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 256): Tiles(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 32, 8, 1)),
}


class Prepared(NamedTuple):
    """Filled up to whole blocks: the spans of every query, the last query that sees a key in its own segment [B, T], and
    what each kernel's blocks walk over, [B, blocks, 4]: a first block and a number of blocks, twice (own segments,
    contexts; without contexts, [B, blocks, 2]). All int32."""

    spans: Spans
    last: jax.Array
    forward: jax.Array
    dq: jax.Array
    dkv: jax.Array


def why_not(call: Any) -> str | None:
    if not platform.runs_on("gpu"):
        return f"it is made for GPU, not {platform.platform()}"
    if call.T != call.S:
        return f"it needs as many queries as keys, not {call.T} and {call.S}"
    if call.H > 256:
        return f"it holds heads of at most 256, not {call.H}"
    if str(call.dtype) not in DTYPES:
        return f"it computes in {', '.join(DTYPES)}, not {call.dtype}"
    if sharding.shards("T") > 1:
        return "every device needs whole rows, and the mesh splits them"
    return None


def prepare(
    call: Any, positions_BT: jax.Array, segments_BT: jax.Array, contexts_BT: jax.Array | None = None
) -> Prepared | None:
    """None where the mesh still splits the batch: every device then prepares its own rows."""
    if sharding.shards("B") > 1:
        return None
    tiles = tiles_of(call.dtype, call.H, call.T)
    return _prepare(tiles, call.window, positions_BT, segments_BT, contexts_BT)


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del k_positions, k_segments  # T == S: queries and keys are the same tokens
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    tiles = tiles_of(q_BTNH.dtype, H, T)
    places = (q_positions, q_segments, *(() if q_contexts is None else (q_contexts,)))
    if prepared is None and sharding.shards("B") == 1:
        prepared = _prepare(tiles, window, *places)
    given = places if prepared is None else prepared

    def mine(q_BTNH, k_BSKH, v_BSKH, *given):
        made = _prepare(tiles, window, *given) if prepared is None else jax.tree.unflatten(tree, given)
        return _attention(scale, tiles, q_BTNH, k_BSKH, v_BSKH, made)

    flat, tree = jax.tree.flatten(given)
    whole = "BT" if prepared is None else ""
    return sharding.local(mine, ["BTNH", "BTKH", "BTKH", *[whole] * len(flat)], "BTNH")(q_BTNH, k_BSKH, v_BSKH, *flat)


# ---------------------------------------------------------------- what the blocks of a row walk over


def _filled(size: int) -> int:
    """What Triton holds it in: a power of two, for its dots 16 at least."""
    return max(16, pl.next_power_of_2(size))


def tiles_of(dtype: Any, H: int, T: int) -> Tiles:
    """The table's tiles, no larger than a short row needs."""
    most = _filled(T)
    tiles = TILES[jnp.dtype(dtype).itemsize, max(64, _filled(H))]
    return Tiles(*(tile._replace(queries=min(tile.queries, most), keys=min(tile.keys, most)) for tile in tiles))


def _prepare(tiles: Tiles, window: int | None, positions_BT, segments_BT, contexts_BT=None) -> Prepared:
    sees = spans(positions_BT, segments_BT, contexts_BT, window)
    faults = broken(positions_BT, segments_BT, contexts_BT, sees)
    largest = max(max(tile.queries, tile.keys) for tile in tiles)
    T = segments_BT.shape[1]
    more = -T % largest
    sees, last = pad(sees, T + more), jnp.pad(_last(segments_BT, window), ((0, 0), (0, more)), constant_values=-1)
    forward = jnp.where(faults[:, None, None], FAULT, _key_blocks(sees, tiles.forward))
    return Prepared(sees, last, forward, _key_blocks(sees, tiles.dq), _query_blocks(sees, tiles.dkv))


def _last(segments_BT: jax.Array, window: int | None) -> jax.Array:
    place = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    ends = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = jax.lax.cummin(jnp.where(ends, place, NEVER), axis=1, reverse=True)
    last = last if window is None else jnp.minimum(last, place + (window - 1))
    return jnp.where(segments_BT != 0, last, -1)


def _ranges(sees: Spans, tile: Tile) -> list[tuple[jax.Array, jax.Array]]:
    """(first, end) of the key blocks that each query block sees [B, blocks]: in its own segments, in its contexts."""
    blocks = (sees.first.shape[0], -1, tile.queries)
    place = jnp.broadcast_to(jnp.arange(sees.first.shape[1], dtype=jnp.int32), sees.first.shape)
    edges = [(sees.first, jnp.where(sees.first < NEVER, place, -1))]
    if sees.context_first is not None and sees.context_last is not None:
        edges.append((sees.context_first, sees.context_last))
    return [(a.reshape(blocks).min(-1) // tile.keys, z.reshape(blocks).max(-1) // tile.keys + 1) for a, z in edges]


def _walk(own: tuple[jax.Array, jax.Array], *context: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Ranges [B, blocks] as the kernels read them: (first, number) of every range, empty ones (0, 0)."""
    pairs = []
    for first, end in (own, *context):
        number = jnp.maximum(end - first, 0)
        pairs += [jnp.where(number > 0, first, 0), number]
    return jnp.stack(pairs, -1)


def _key_blocks(sees: Spans, tile: Tile) -> jax.Array:
    own, *context = _ranges(sees, tile)
    # both walks share the mask, so a block that stands in both ranges is visited once
    return _walk(own, *((first, jnp.minimum(end, own[0])) for first, end in context))


def _query_blocks(sees: Spans, tile: Tile) -> jax.Array:
    keys = jnp.arange(sees.first.shape[1] // tile.keys, dtype=jnp.int32)
    turned = []
    for first, end in _ranges(sees, tile):
        meets = (first[:, :, None] <= keys) & (keys < end[:, :, None])  # [B, query blocks, key blocks]
        number = jnp.arange(first.shape[1], dtype=jnp.int32)[None, :, None]
        turned.append((jnp.where(meets, number, NEVER).min(1), jnp.where(meets, number, -1).max(1) + 1))
    own, *context = turned
    return _walk(own, *((jnp.maximum(first, own[1]), end) for first, end in context))


# ---------------------------------------------------------------- kernels


def _walks(walk_ref: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(number of blocks, number -> block) of one block's walk."""
    if walk_ref.shape == (2,):
        first, number = walk_ref[0], walk_ref[1]
        return number, lambda n: first + n
    first, number, context, more = (walk_ref[i] for i in range(4))
    return number + more, lambda n: jnp.where(n < number, first + n, context + n - number)


class _Rows(NamedTuple):
    """Reads and writes rows of [T, H] arrays, of which the last rows or columns may not fill a block."""

    T: int
    H: int

    def _there(self, start: Any, shape: tuple[int, int]) -> jax.Array | None:
        """Which elements of the rows from `start` on exist; None for all."""
        size, width = shape
        rows = (start + jnp.arange(size) < self.T)[:, None] if self.T % size else None
        columns = (jnp.arange(width) < self.H)[None, :] if width != self.H else None
        if rows is None or columns is None:
            there = columns if rows is None else rows
            return None if there is None else jnp.broadcast_to(there, shape)
        return rows & columns

    def load(self, ref: Any, start: Any) -> jax.Array:
        """The rows that begin at `start`, all of `ref`; zero where there are none."""
        there = self._there(start, ref.shape)
        return plgpu.load(ref, mask=there, other=None if there is None else 0.0)

    def store(self, ref: Any, start: Any, value: jax.Array) -> None:
        plgpu.store(ref, value.astype(ref.dtype), mask=self._there(start, ref.shape))


def _dot(a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def _exp2(x: jax.Array, factor: float, more: Any) -> jax.Array:
    """2 ** (x * factor + more) in two instructions, of which every score needs one; what `jnp.exp2` adds to them, exact
    results below the smallest normal number, took a sixth of all instructions of the loops."""
    if platform.interpret():
        return jnp.exp2(x * factor + more)
    asm = "{ .reg .f32 t; fma.rn.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }"
    args = [x, *(jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape) for a in (factor, more))]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.elementwise_inline_asm(asm, args=args, constraints="=f,f,f,f", pack=1, result_shape_dtypes=[shape])[0]


def _sees(q_place: jax.Array, k_place: jax.Array, first: jax.Array, *context: jax.Array) -> jax.Array:
    return _either((k_place >= first) & (k_place <= q_place), k_place, *context)


def _either(seen: jax.Array, k_place: jax.Array, *context: jax.Array) -> jax.Array:
    """What is seen in the own segment or, where there are contexts, from the first to the last place in those."""
    return seen | ((k_place >= context[0]) & (k_place <= context[1])) if context else seen


def _forward_kernel(walk_ref, *refs, rows: _Rows, tile: Tile, scale: float):
    """Algorithm 1: one block of queries of one head; refs are its spans, q, all keys and values, out, norm."""
    *span_refs, q_ref, k_ref, v_ref, out_ref, norm_ref = refs
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * tile.queries
    q_place = (start + jnp.arange(tile.queries))[:, None]
    spans_of = [ref[...][:, None] for ref in span_refs]
    q = rows.load(q_ref, start)
    steps, block = _walks(walk_ref)
    base2 = scale * LOG2E

    def body(n, carry):
        peak, total, out = carry
        at = block(n) * tile.keys
        here = pl.ds(at, tile.keys)
        scores = _dot(q, rows.load(k_ref.at[here, :], at), TRANSPOSED)
        scores = jnp.where(_sees(q_place, (at + jnp.arange(tile.keys))[None, :], *spans_of), scores, MASKED)
        new = jnp.maximum(peak, scores.max(1))
        weights, fade = _exp2(scores, base2, (new * -base2)[:, None]), _exp2(peak - new, base2, 0.0)
        v = rows.load(v_ref.at[here, :], at)
        return new, total * fade + weights.sum(1), out * fade[:, None] + _dot(weights.astype(v.dtype), v, PLAIN)

    zeros = jnp.zeros(tile.queries, jnp.float32)
    carry = (zeros + FLOOR, zeros, jnp.zeros(q_ref.shape, jnp.float32))
    peak, total, out = jax.lax.fori_loop(0, steps, body, carry)
    total = jnp.where(walk_ref[0] == FAULT, jnp.nan, jnp.maximum(total, 1e-30))  # 0 where a query sees nothing
    rows.store(out_ref, start, out / total[:, None])
    norm_ref[...] = peak * base2 + jnp.log2(total)


def _dq_kernel(walk_ref, *refs, rows: _Rows, tile: Tile, scale: float):
    """Algorithm 2 for one block of queries of one head, and rowsum(dO * O) for the other kernel (line 4)."""
    *span_refs, q_ref, k_ref, v_ref, out_ref, dout_ref, norm_ref, dq_ref, delta_ref = refs
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * tile.queries
    q_place = (start + jnp.arange(tile.queries))[:, None]
    spans_of = [ref[...][:, None] for ref in span_refs]
    q, dout, norm = rows.load(q_ref, start), rows.load(dout_ref, start), norm_ref[...][:, None]
    delta = (dout.astype(jnp.float32) * rows.load(out_ref, start).astype(jnp.float32)).sum(1)
    delta_ref[...] = delta
    steps, block = _walks(walk_ref)

    def body(n, dq):
        at = block(n) * tile.keys
        here = pl.ds(at, tile.keys)
        k, v = rows.load(k_ref.at[here, :], at), rows.load(v_ref.at[here, :], at)
        seen = _sees(q_place, (at + jnp.arange(tile.keys))[None, :], *spans_of)
        weights = _exp2(jnp.where(seen, _dot(q, k, TRANSPOSED), MASKED), scale * LOG2E, -norm)
        dscores = weights * (_dot(dout, v, TRANSPOSED) - delta[:, None])
        return dq + _dot(dscores.astype(k.dtype), k, PLAIN)

    dq = jax.lax.fori_loop(0, steps, body, jnp.zeros(q_ref.shape, jnp.float32))
    rows.store(dq_ref, start, dq * scale)


def _dkv_kernel(walk_ref, *refs, rows: _Rows, tile: Tile, scale: float):
    """Algorithm 2 for one block of keys of one key head: all query heads of its group, tiles as [keys, queries]."""
    last_ref, *context_refs, q_ref, k_ref, v_ref, dout_ref, norm_ref, delta_ref, dk_ref, dv_ref = refs
    start, heads = pl.program_id(0) * tile.keys, q_ref.shape[1]
    k_place, k_last = (start + jnp.arange(tile.keys))[:, None], last_ref[...][:, None]
    k, v = rows.load(k_ref, start), rows.load(v_ref, start)
    steps, block = _walks(walk_ref)

    def body(n, carry):
        dk, dv = carry
        head = jax.lax.rem(n, heads)
        at = block(jax.lax.div(n, heads)) * tile.queries
        here = pl.ds(at, tile.queries)
        q, dout = rows.load(q_ref.at[here, head, :], at), rows.load(dout_ref.at[here, head, :], at)
        norm, delta = norm_ref[head, here][None, :], delta_ref[head, here][None, :]
        q_place = (at + jnp.arange(tile.queries))[None, :]
        # by the key's last query and not by the query's first key: values that go down a tile take fewer registers
        seen = _either((q_place >= k_place) & (q_place <= k_last), k_place, *(ref[here][None, :] for ref in context_refs))
        weights = _exp2(jnp.where(seen, _dot(k, q, TRANSPOSED), MASKED), scale * LOG2E, -norm)
        dv += _dot(weights.astype(dout.dtype), dout, PLAIN)
        dscores = weights * (_dot(v, dout, TRANSPOSED) - delta)
        return dk + _dot(dscores.astype(q.dtype), q, PLAIN), dv

    zeros = jnp.zeros(k_ref.shape, jnp.float32)
    dk, dv = jax.lax.fori_loop(0, steps * heads, body, (zeros, zeros))
    rows.store(dk_ref, start, dk * scale)
    rows.store(dv_ref, start, dv)


# ---------------------------------------------------------------- calls


def _by_queries(kernel, tile: Tile, scale: float, walk, sees: Spans, arrays: str, operands, results: str):
    """`kernel` over (blocks of queries, heads, rows of the batch). `arrays` and `results` say what each operand and each
    result is: q for [B, T, N, H] in blocks, k for all of [B, T, K, H], n for [B, N, T filled up] in blocks."""
    q_BTNH, k_BTKH = operands[:2]
    B, T, N, H = q_BTNH.shape
    G, filled, width = N // k_BTKH.shape[2], sees.first.shape[1], _filled(H)
    blocks = filled // tile.queries

    def at(i):  # longest walks first: what begins last should end soon
        return blocks - 1 - i

    specs = {
        "q": pl.BlockSpec((None, tile.queries, None, width), lambda i, n, b: (b, at(i), n, 0)),
        "k": pl.BlockSpec((None, filled, None, width), lambda _, n, b: (b, 0, jax.lax.div(n, G), 0)),
        "n": pl.BlockSpec((None, None, tile.queries), lambda i, n, b: (b, n, at(i))),
    }
    own = [pl.BlockSpec((None, None, walk.shape[-1]), lambda i, _, b: (b, at(i), 0))]
    own += [pl.BlockSpec((None, tile.queries), lambda i, _, b: (b, at(i)))] * len(jax.tree.leaves(sees))
    shapes = {"q": jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype), "n": jax.ShapeDtypeStruct((B, N, filled), jnp.float32)}
    return pl.pallas_call(
        partial(kernel, rows=_Rows(T, H), tile=tile, scale=scale),
        grid=(blocks, N, B),
        in_specs=own + [specs[what] for what in arrays],
        out_specs=[specs[what] for what in results],
        out_shape=[shapes[what] for what in results],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=platform.interpret(),
        name=kernel.__name__.strip("_"),
    )(walk, *jax.tree.leaves(sees), *operands)


def _by_keys(tile: Tile, scale: float, prepared: Prepared, q_BTNH, k_BTKH, v_BTKH, dout_BTNH, norm, delta):
    """`_dkv_kernel` over (blocks of keys, key heads, rows of the batch)."""
    B, T, K, H = k_BTKH.shape
    filled, width, walk = prepared.last.shape[1], _filled(H), prepared.dkv
    contexts = jax.tree.leaves(prepared.spans)[1:]
    G = q_BTNH.shape[2] // K
    queries = pl.BlockSpec((None, filled, G, width), lambda _, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, tile.keys, None, width), lambda i, n, b: (b, i, n, 0))
    vector = pl.BlockSpec((None, G, filled), lambda _, n, b: (b, n, 0))
    own = [
        pl.BlockSpec((None, None, walk.shape[-1]), lambda i, _, b: (b, i, 0)),
        pl.BlockSpec((None, tile.keys), lambda i, _, b: (b, i)),
        *[pl.BlockSpec((None, filled), lambda *at: (at[2], 0))] * len(contexts),
    ]
    return pl.pallas_call(
        partial(_dkv_kernel, rows=_Rows(T, H), tile=tile, scale=scale),
        grid=(filled // tile.keys, K, B),
        in_specs=[*own, queries, keys, keys, queries, vector, vector],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (k_BTKH, v_BTKH)],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=platform.interpret(),
        name="dkv_kernel",
    )(walk, prepared.last, *contexts, q_BTNH, k_BTKH, v_BTKH, dout_BTNH, norm, delta)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale: float, tiles: Tiles, q_BTNH, k_BTKH, v_BTKH, prepared: Prepared):
    return _forward(scale, tiles, q_BTNH, k_BTKH, v_BTKH, prepared)[0]


def _forward(scale, tiles, q_BTNH, k_BTKH, v_BTKH, prepared):
    operands = (q_BTNH, k_BTKH, v_BTKH)
    out_BTNH, norm = _by_queries(_forward_kernel, tiles.forward, scale, prepared.forward, prepared.spans, "qkk", operands, "qn")
    return out_BTNH, (*operands, prepared, out_BTNH, norm)


def _backward(scale, tiles, saved, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, prepared, out_BTNH, norm = saved
    operands = (q_BTNH, k_BTKH, v_BTKH, out_BTNH, dout_BTNH, norm)
    dq_BTNH, delta = _by_queries(_dq_kernel, tiles.dq, scale, prepared.dq, prepared.spans, "qkkqqn", operands, "qn")
    dk_BTKH, dv_BTKH = _by_keys(tiles.dkv, scale, prepared, q_BTNH, k_BTKH, v_BTKH, dout_BTNH, norm, delta)
    return dq_BTNH, dk_BTKH, dv_BTKH, None


_attention.defvjp(_forward, _backward)

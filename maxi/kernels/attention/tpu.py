"""Attention for TPU, in Pallas: flash attention that visits only pairs of blocks in which something is seen.

The grid walks a work list (`work.py`) of run-time length, made once a step: a row packed with short documents costs its
documents. The heads of a group are stacked in one tile of G times q_block queries, so keys and values are read once a
group, and one step does several groups: they share the mask, the step's own cost, and each fills the other's waits.

The backward pass is one kernel of five matmuls (Dao, arXiv:2307.08691, algorithm 2, has seven in two kernels). It walks
keys on the outside and holds the gradient of a row's queries in VMEM meanwhile. Where those do not fit it takes them by
chunks, and a key block that a later chunk sees again leaves its float32 sums in HBM: memory is linear in T. Its tiles are
transposed, keys down and queries across, which saves it transposing them for the gradients of keys and values.

Rows that break the contract of `maxi.kernels.attention` come out as NaN, which stops a run, and not as another mask.
Sizes of tiles are in `tpu_blocks.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxi import sharding
from maxi.kernels.attention import tpu_blocks, work
from maxi.kernels.attention.reference import LOWEST, MASKED
from maxi.kernels.attention.spans import Spans, pad, spans
from maxi.kernels.attention.tpu_blocks import Sizes
from maxi.kernels.attention.work import Work
from maxi.kernels.platform import interpret, platform, runs_on

LEAST = 1e-30
"""Stands for the normaliser of a query that sees nothing; its sums are 0."""
LOG2E = math.log2(math.e)
"""Scores are kept in base 2: the exponential that the hardware has."""
LANES = tpu_blocks.LANES
reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal  # jax 0.12 has moved it


class Prepared(NamedTuple):
    """What the kernels need beside q, k and v.

    The rows [B, blocks, 1 or 3, q_block], float32, hold where the spans of a block's queries begin: the first key of their
    own, which ends at the query, and, where there are contexts, the first and last key of that one.
    """

    forward: Work
    forward_rows: jax.Array
    backward: Work
    backward_rows: jax.Array


class _Plan(NamedTuple):
    """What is static about a call. `heads`: key heads in a step, forward and backward. `partials`: sets of float32 sums that
    the backward pass may leave in HBM, one for all heads where they take their turns, one each where two cores share them."""

    sizes: Sizes
    scale: float
    heads: tuple[int, int]
    partials: int
    interpret: Any


def why_not(call: Any) -> str | None:
    if not runs_on("tpu"):
        return f"it is made for TPU, not {platform()}"
    if call.T != call.S:
        return f"it needs as many queries as keys, not {call.T} and {call.S}"
    if call.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {call.dtype}"
    if sharding.shards("T") > 1:
        return "rows are split over the mesh axis context"
    if tpu_blocks.choose(call) is None:
        return f"the work list of {call.B} rows of {call.T} tokens does not fit a core's scalar memory"
    return None


def prepare(call: Any, positions_BT: jax.Array, segments_BT: jax.Array, contexts_BT: jax.Array | None) -> Prepared | None:
    """Work lists and spans of these rows; None while the mesh still splits them: every device then makes its own part's."""
    if sharding.shards("B") > 1:
        return None
    sizes = tpu_blocks.choose(call)
    assert sizes is not None, call
    return _prepare(sizes, call.window, positions_BT, segments_BT, contexts_BT)


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del k_positions, k_segments  # T == S: queries and keys are the same tokens
    places = tuple(place for place in (q_positions, q_segments, q_contexts) if place is not None)
    prepared = None if sharding.shards("B") > 1 else prepared
    flat, tree = jax.tree.flatten(prepared)
    how = interpret()

    def part(q_BTNH, k_BTKH, v_BTKH, *rest):
        places, ready = rest[: len(rest) - len(flat)], jax.tree.unflatten(tree, rest[len(rest) - len(flat) :])
        return kernel(q_BTNH, k_BTKH, v_BTKH, places, window=window, scale=scale, prepared=ready, interpret=how)

    inputs = ("BTNH", "BTKH", "BTKH", *["BT"] * len(places), *[""] * len(flat))
    return sharding.local(part, inputs, "BTNH")(q_BTNH, k_BSKH, v_BSKH, *places, *flat)


class Shape(NamedTuple):
    """The part of `maxi.kernels.attention.Call` that sizes depend on, of one device's arrays."""

    B: int
    T: int
    N: int
    K: int
    H: int
    dtype: Any


def kernel(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    places: tuple[jax.Array, ...],
    *,
    window: int | None,
    scale: float,
    prepared: Prepared | None = None,
    sizes: Sizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Attention over one device's arrays. `places` are positions, segments and, where there are any, contexts [B, T]."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    sizes = sizes or tpu_blocks.choose(Shape(B, T, N, K, H, q_BTNH.dtype))
    assert sizes is not None, q_BTNH.shape
    if prepared is None:
        prepared = _prepare(sizes, window, *places, *[None] * (3 - len(places)))
    q_BKGTH = _heads_first(q_BTNH, K, sizes.T)
    k_BKTH, v_BKTH = (_heads_first(x, K, sizes.T)[:, :, 0] for x in (k_BTKH, v_BTKH))
    out_BKGTH: jax.Array = _attention(plan(sizes, scale, N // K, K, interpret), q_BKGTH, k_BKTH, v_BKTH, prepared)
    return out_BKGTH[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def plan(sizes: Sizes, scale: float, G: int, K: int, interpret: Any) -> _Plan:
    blocks = sizes.blocks
    heads = [tpu_blocks.heads(G * q_block, K, sizes) for q_block in (blocks.q_forward, blocks.q_backward)]
    return _Plan(sizes, scale, (heads[0], heads[1]), K // heads[1] if sizes.cores > 1 else 1, interpret)


def _heads_first(x_BTNH: jax.Array, K: int, padded: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    x_BKGTH = x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return x_BKGTH if padded == T else jnp.pad(x_BKGTH, ((0, 0), (0, 0), (0, 0), (0, padded - T), (0, 0)))


# --- what is the same for all layers -------------------------------------------------------------------------------------


def _prepare(sizes: Sizes, window, positions_BT, segments_BT, contexts_BT) -> Prepared:
    seen = spans(positions_BT, segments_BT, contexts_BT, window)
    faults = work.broken(positions_BT, segments_BT, contexts_BT, seen)
    seen = pad(seen, sizes.T)
    blocks = sizes.blocks
    forward = work.seen_blocks(seen, blocks.q_forward, blocks.k_forward)
    backward = work.seen_blocks(seen, blocks.q_backward, blocks.k_backward)
    return Prepared(
        work.by_query(forward, faults, sizes.entries_forward),
        _rows(seen, blocks.q_forward),
        work.by_key(backward, sizes.chunk // blocks.q_backward, sizes.entries_backward),
        _rows(seen, blocks.q_backward),
    )


def _rows(seen: Spans, q_block: int) -> jax.Array:
    B, T = seen.first.shape
    rows = jnp.stack([row for row in seen if row is not None], 1)
    blocks = rows.reshape(B, rows.shape[1], T // q_block, q_block).swapaxes(1, 2)
    return blocks.astype(jnp.float32)  # exact below 2 ** 24 tokens, and as fast to compare


# --- kernels -------------------------------------------------------------------------------------------------------------


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices over one dimension of each."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _stacked(block: jax.Array) -> jax.Array:
    """The heads of a group on top of each other: [G, q_block, H] as [G * q_block, H]."""
    return block.reshape(-1, block.shape[-1])


def _wide(x: jax.Array, width: int) -> jax.Array:
    """A column that fills all lanes, made `width` wide: no data moves."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _column(row: jax.Array) -> jax.Array:
    """[1, n] as [n, LANES]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(column: jax.Array) -> jax.Array:
    """[n, LANES] of equal lanes as [1, n]: the sum of its diagonals, where a transpose would be five times the work."""
    n = column.shape[0]
    at, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    parts = [jnp.where(at == lane, column[i : i + LANES], 0.0).sum(0, keepdims=True) for i in range(0, n, LANES)]
    return jnp.concatenate(parts, 1)


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x to float32, from the hardware's guess and two steps of Newton: a third of what the division takes."""
    guess = reciprocal(x, approx=True)
    guess = guess * (2.0 - x * guess)
    return guess * (2.0 - x * guess)


def _bias(shape: tuple[int, int], queries: int, ahead: jax.Array, spans: list[jax.Array]) -> jax.Array:
    """0 where a query sees a key, `MASKED` elsewhere; queries along the axis `queries`. `ahead`: how far the block of queries
    stands after that of keys; `spans`, in keys of the block, spread over the other axis."""
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
    past = jax.lax.broadcasted_iota(jnp.int32, shape, queries) - key + ahead >= 0
    key = key.astype(jnp.float32)
    seen = past & (spans[0] <= key)
    if len(spans) == 3:
        seen |= (spans[1] <= key) & (key <= spans[2])
    return jnp.where(seen, 0.0, MASKED)


def _places(place: Any, step: Any, q_block: int, k_block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The current entry's flags (and more above them), first query and first key."""
    at = pl.program_id(1)
    entry = step[at]
    return entry, work.query_block(place[at]) * q_block, work.key_block(entry) * k_block


def _forward_kernel(
    place, step, q_ref, k_ref, v_ref, rows_ref, out_ref, norm_ref, spans_ref, peak_ref, total_ref, sums_ref, *, plan
):
    """Softmax as it goes (algorithm 1): `peak_ref` and `total_ref` in all lanes, per head of the step."""
    blocks = plan.sizes.blocks
    bq, bk, G, H = blocks.q_forward, blocks.k_forward, q_ref.shape[1], q_ref.shape[3]
    entry, query, key = _places(place, step, bq, bk)
    fresh = entry & work.FIRST != 0

    @pl.when(fresh)
    def _():
        for i in range(rows_ref.shape[0]):
            spans_ref[i] = _column(rows_ref[i : i + 1, :])

    @pl.when(entry & work.SEEN != 0)
    def _():
        begin = key.astype(jnp.float32)
        spans = [_wide(spans_ref[i] - begin, bk) for i in range(rows_ref.shape[0])]
        bias = jnp.concatenate([_bias((bq, bk), 0, query - key, spans)] * G, 0)
        for head in range(plan.heads[0]):
            v = v_ref[head]
            scores = _dot(_stacked(q_ref[head]), k_ref[head], (1, 1)) * (plan.scale * LOG2E) + bias
            # the first entry starts afresh by selecting: clearing what is kept would take longer
            before = jnp.where(fresh, LOWEST, peak_ref[head])
            peak = jnp.maximum(before, scores.max(1, keepdims=True))
            weights, shrink = jnp.exp2(scores - _wide(peak, bk)), jnp.exp2(before - peak)
            peak_ref[head] = peak
            total_ref[head] = jnp.where(fresh, 0.0, total_ref[head]) * shrink + weights.sum(1, keepdims=True)
            sums = jnp.where(fresh, 0.0, sums_ref[head]) * _wide(shrink, H)
            sums_ref[head] = sums + _dot(weights.astype(v.dtype), v, (1, 0))

    @pl.when(entry & (work.LAST | work.SEEN) == work.LAST | work.SEEN)
    def _():
        for head in range(plan.heads[0]):
            total = jnp.maximum(total_ref[head], LEAST)
            out_ref[head] = (sums_ref[head] * _wide(_inverse(total), H)).astype(out_ref.dtype).reshape(G, bq, H)
            norm_ref[head] = _row(peak_ref[head]) + jnp.log2(_row(total))

    @pl.when(entry & work.SEEN == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        norm_ref[...] = jnp.full_like(norm_ref, LOWEST)

    @pl.when(entry & work.BROKEN != 0)
    def _():
        out_ref[...] = jnp.full_like(out_ref, jnp.nan)


def _backward_kernel(
    place,
    step,
    q_ref,
    dout_ref,
    k_ref,
    v_ref,
    norm_ref,
    delta_ref,
    rows_ref,
    dk_ref,
    dv_ref,
    dq_ref,
    partials,
    dq_sums,
    sums,
    arrived,
    *,
    plan,
):
    """Per head of the step, `dq_sums` of the queries of a chunk and `sums`, dk and dv, of the key block."""
    blocks, chunked = plan.sizes.blocks, plan.sizes.chunk < plan.sizes.T
    bq, bk, G, H = blocks.q_backward, blocks.k_backward, q_ref.shape[1], q_ref.shape[3]
    entry, query, key = _places(place, step, bq, bk)
    own = jax.lax.rem(pl.program_id(0), plan.partials)

    @pl.when(entry & work.CHUNK_FIRST != 0)
    def _():
        dq_sums[...] = jnp.zeros_like(dq_sums)

    @pl.when(entry & (work.FIRST | (work.RESUMES if chunked else 0)) == work.FIRST)
    def _():
        sums[...] = jnp.zeros_like(sums)

    def partial_sums():
        return partials.at[own, :, :, pl.ds(pl.multiple_of(key, bk), bk), :]

    if chunked:

        @pl.when(entry & (work.FIRST | work.RESUMES) == work.FIRST | work.RESUMES)
        def _():
            pltpu.async_copy(partial_sums(), sums, arrived).wait()

    @pl.when(entry & work.SEEN != 0)
    def _():
        begin = key.astype(jnp.float32)
        spans = [rows_ref[i : i + 1, :] - begin for i in range(rows_ref.shape[0])]
        bias = jnp.concatenate([_bias((bk, bq), 1, query - key, spans)] * G, 1)
        here = pl.ds(pl.multiple_of(jax.lax.rem(query, plan.sizes.chunk), bq), bq)
        for head in range(plan.heads[1]):
            q, dout, k = _stacked(q_ref[head]), _stacked(dout_ref[head]), k_ref[head]
            scores = _dot(k, q, (1, 1)) * (plan.scale * LOG2E) + bias
            weights = jnp.exp2(scores - norm_ref[head])
            sums[1, head] += _dot(weights.astype(dout.dtype), dout, (1, 0))
            dscores = (weights * (_dot(v_ref[head], dout, (1, 1)) - delta_ref[head])).astype(q.dtype)
            sums[0, head] += _dot(dscores, q, (1, 0))
            dq_sums[head, :, here, :] += _dot(dscores, k, (0, 0)).reshape(G, bq, H)

    if chunked:

        @pl.when(entry & (work.LAST | work.PAUSES) == work.LAST | work.PAUSES)
        def _():
            pltpu.async_copy(sums, partial_sums(), arrived).wait()

    @pl.when(entry & (work.LAST | (work.PAUSES if chunked else 0)) == work.LAST)
    def _():
        dk_ref[...] = (sums[0] * plan.scale).astype(dk_ref.dtype)
        dv_ref[...] = sums[1].astype(dv_ref.dtype)

    @pl.when(entry & work.CHUNK_LAST != 0)
    def _():
        dq_ref[...] = (dq_sums[...] * plan.scale).astype(dq_ref.dtype)


# --- calls ---------------------------------------------------------------------------------------------------------------


class _At(NamedTuple):
    """Where the grid stands: which key heads, and the current entry's row, query block, key block and written key block."""

    heads: jax.Array
    row: jax.Array
    query: jax.Array
    key: jax.Array
    written: jax.Array


def _spec(shape: tuple[int | None, ...], block: Callable[[_At], tuple[Any, ...]]) -> pl.BlockSpec:
    def index(heads, entry, place, step):
        at, did = place[entry], step[entry]
        return block(_At(heads, work.row(at), work.query_block(at), work.key_block(did), work.written(did)))

    return pl.BlockSpec(shape, index)


class _Specs(NamedTuple):
    """Blocks of the arrays of a pass: q, k, the one row of statistics, and where spans begin."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    stats: pl.BlockSpec
    rows: pl.BlockSpec


def _specs(heads: int, G: int, H: int, bq: int, bk: int, kinds: int) -> _Specs:
    return _Specs(
        _spec((None, heads, G, bq, H), lambda at: (at.row, at.heads, 0, at.query, 0)),
        _spec((None, heads, bk, H), lambda at: (at.row, at.heads, at.key, 0)),
        _spec((None, heads, None, 1, G * bq), lambda at: (at.row, at.heads, at.query, 0, 0)),
        _spec((None, None, kinds, bq), lambda at: (at.row, at.query, 0, 0)),
    )


def _call(body, plan: _Plan, todo: Work, heads: int, matmuls: int, inputs, outputs, scratch, arrays, name: str):
    """`inputs` are specs, `outputs` specs and shapes. Costs are given as if every row were one document."""
    B, K, G, T, H = arrays[0].shape
    pairs = B * K * G * T * T // 2
    moved = sum(x.size * x.dtype.itemsize for x in arrays) + sum(math.prod(x.shape) * x.dtype.itemsize for x in outputs[1])
    return pl.pallas_call(
        partial(body, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(K // heads, todo.size),
            in_specs=inputs,
            out_specs=outputs[0],
            scratch_shapes=scratch,
        ),
        out_shape=outputs[1],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.sizes.vmem),
        cost_estimate=pl.CostEstimate(flops=2 * matmuls * pairs * H, transcendentals=pairs, bytes_accessed=moved),
        interpret=plan.interpret,
        name=name,
    )(todo.place, todo.step, *arrays)


def _forward(plan: _Plan, q_BKGTH, k_BKTH, v_BKTH, ready: Prepared) -> tuple[jax.Array, jax.Array]:
    """Attended values and, in base 2, the log of every query's normaliser [B, K, blocks, 1, G * q_block]."""
    B, K, G, T, H = q_BKGTH.shape
    bq, bk, heads = plan.sizes.blocks.q_forward, plan.sizes.blocks.k_forward, plan.heads[0]
    kinds = ready.forward_rows.shape[2]
    specs = _specs(heads, G, H, bq, bk, kinds)
    shapes = [
        jax.ShapeDtypeStruct(q_BKGTH.shape, q_BKGTH.dtype),
        jax.ShapeDtypeStruct((B, K, T // bq, 1, G * bq), jnp.float32),
    ]
    kept = ((kinds, bq, LANES), (heads, G * bq, LANES), (heads, G * bq, LANES), (heads, G * bq, H))
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in kept]
    inputs, outputs = [specs.queries, specs.keys, specs.keys, specs.rows], ([specs.queries, specs.stats], shapes)
    arrays = (q_BKGTH, k_BKTH, v_BKTH, ready.forward_rows)
    return _call(_forward_kernel, plan, ready.forward, heads, 2, inputs, outputs, scratch, arrays, "attention_forward")


def _backward(plan: _Plan, q_BKGTH, dout_BKGTH, k_BKTH, v_BKTH, norms, deltas, ready: Prepared) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v; norms and deltas [B, K, blocks, 1, G * q_block]."""
    _, _, G, T, H = q_BKGTH.shape
    bq, bk, chunk, heads = plan.sizes.blocks.q_backward, plan.sizes.blocks.k_backward, plan.sizes.chunk, plan.heads[1]
    specs = _specs(heads, G, H, bq, bk, ready.backward_rows.shape[2])
    held = _spec((None, heads, G, chunk, H), lambda at: (at.row, at.heads, 0, jax.lax.div(at.query, chunk // bq), 0))
    written = _spec((None, heads, bk, H), lambda at: (at.row, at.heads, at.written, 0))
    left = (plan.partials, 2, heads, T, H) if chunk < T else (1, 1, 1, 8, LANES)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_BKTH, v_BKTH, q_BKGTH)]
    outputs = (
        [written, written, held, pl.BlockSpec(memory_space=pl.ANY)],
        [*shapes, jax.ShapeDtypeStruct(left, jnp.float32)],
    )
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in ((heads, G, chunk, H), (2, heads, bk, H))]
    scratch.append(pltpu.SemaphoreType.DMA(()))
    inputs = [specs.queries, specs.queries, specs.keys, specs.keys, specs.stats, specs.stats, specs.rows]
    arrays = (q_BKGTH, dout_BKGTH, k_BKTH, v_BKTH, norms, deltas, ready.backward_rows)
    done = _call(_backward_kernel, plan, ready.backward, heads, 5, inputs, outputs, scratch, arrays, "attention_backward")
    return done[2], done[0], done[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q_BKGTH, k_BKTH, v_BKTH, ready: Prepared) -> jax.Array:
    return _forward(plan, q_BKGTH, k_BKTH, v_BKTH, ready)[0]


def _fwd(plan, q_BKGTH, k_BKTH, v_BKTH, ready):
    out_BKGTH, norms = _forward(plan, q_BKGTH, k_BKTH, v_BKTH, ready)
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, ready, out_BKGTH, norms)


def _blocked(x_BKGT: jax.Array, bq: int) -> jax.Array:
    B, K, G, T = x_BKGT.shape
    return x_BKGT.reshape(B, K, G, T // bq, bq).swapaxes(2, 3).reshape(B, K, T // bq, 1, G * bq)


def _bwd(plan, saved, dout_BKGTH):
    q_BKGTH, k_BKTH, v_BKTH, ready, out_BKGTH, norms = saved
    blocks = plan.sizes.blocks
    # rowsum(dO * O) equals rowsum(P * dP), algorithm 2, line 4; behind a barrier, or the sum becomes part of the matmul
    # that makes dO and O is copied into that one's order
    dout_BKGTH = jax.lax.optimization_barrier(dout_BKGTH)
    delta_BKGT = (dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)
    if blocks.q_forward != blocks.q_backward:
        B, K, G, T = delta_BKGT.shape
        norms = norms.reshape(B, K, T // blocks.q_forward, G, blocks.q_forward).swapaxes(2, 3).reshape(B, K, G, T)
        norms = _blocked(norms, blocks.q_backward)
    deltas = _blocked(delta_BKGT, blocks.q_backward)
    dq, dk, dv = _backward(plan, q_BKGTH, dout_BKGTH, k_BKTH, v_BKTH, norms, deltas, ready)
    return dq, dk, dv, None


_attention.defvjp(_fwd, _bwd)

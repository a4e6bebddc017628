"""Attention for TPU, in Pallas: flash attention that visits only pairs of blocks in which something is seen.

The grid walks a work list (`work.py`) of run-time length, made once a step: a row packed with short documents costs its
documents. The heads of a group are stacked in one tile of G times q_block queries, so keys and values are read once a
group. Tiles are transposed, keys down and queries across: what is per query (maximum, normaliser, spans) is then a row
that spreads over the tile for nothing, and needs no reduction across lanes.

The backward pass is one kernel of five matmuls (Dao, arXiv:2307.08691, algorithm 2, has seven in two kernels). It walks
keys on the outside and holds the gradient of a row's queries in VMEM meanwhile. Where those do not fit it takes them by
chunks, and a key block that a later chunk sees again leaves its float32 sums in HBM: memory is linear in T.

Rows that break the contract of `maxi.kernels.attention` come out as NaN, which stops a run, and not as another mask.
Sizes of tiles are in `tpu_blocks.py`.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxi import sharding
from maxi.kernels.attention import tpu_blocks, work
from maxi.kernels.attention.spans import Spans, spans
from maxi.kernels.attention.tpu_blocks import Sizes
from maxi.kernels.attention.work import Work
from maxi.kernels.platform import interpret, platform, runs_on

MASKED, LOWEST = -1e30, -1e20
"""Stand for minus infinity: a masked score lies so far below the lowest maximum that its probability is exactly 0."""
LOG2E = math.log2(math.e)
"""Scores are kept in base 2: the exponential that the hardware has."""


class Prepared(NamedTuple):
    """What the kernels need beside q, k and v.

    The rows [B, blocks, 2 or 4, G * q_block], float32, hold what a stacked tile's queries see: the first and last key of
    their own span and, where there are contexts, of that one.
    """

    forward: Work
    forward_rows: jax.Array
    backward: Work
    backward_rows: jax.Array


class _Plan(NamedTuple):
    """What is static about a call. `partials`: how many sets of float32 sums the backward pass leaves in HBM."""

    sizes: Sizes
    scale: float
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
    return _prepare(sizes, call.N // call.K, call.window, positions_BT, segments_BT, contexts_BT)


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


class _Shape(NamedTuple):
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
    sizes = sizes or tpu_blocks.choose(_Shape(B, T, N, K, H, q_BTNH.dtype))
    assert sizes is not None, q_BTNH.shape
    if prepared is None:
        prepared = _prepare(sizes, N // K, window, *places, *[None] * (3 - len(places)))
    plan = _Plan(sizes, scale, K if sizes.cores > 1 else 1, interpret)
    q_BKGTH = _heads_first(q_BTNH, K, sizes.T)
    k_BKTH, v_BKTH = (_heads_first(x, K, sizes.T)[:, :, 0] for x in (k_BTKH, v_BTKH))
    out_BKGTH = _attention(plan, q_BKGTH, k_BKTH, v_BKTH, prepared)
    return out_BKGTH[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _heads_first(x_BTNH: jax.Array, K: int, padded: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    x_BKGTH = x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return x_BKGTH if padded == T else jnp.pad(x_BKGTH, ((0, 0), (0, 0), (0, 0), (0, padded - T), (0, 0)))


# --- what is the same for all layers -------------------------------------------------------------------------------------


def _prepare(sizes: Sizes, G: int, window, positions_BT, segments_BT, contexts_BT) -> Prepared:
    seen = spans(positions_BT, segments_BT, contexts_BT, window)
    faults = work.broken(positions_BT, segments_BT, contexts_BT, seen)
    seen = work.pad(seen, sizes.T)
    blocks = sizes.blocks
    forward = work.seen_blocks(seen, blocks.q_forward, blocks.k_forward)
    backward = work.seen_blocks(seen, blocks.q_backward, blocks.k_backward)
    return Prepared(
        work.by_query(forward, faults, sizes.entries_forward),
        _rows(seen, G, blocks.q_forward),
        work.by_key(backward, sizes.chunk // blocks.q_backward, sizes.entries_backward),
        _rows(seen, G, blocks.q_backward),
    )


def _rows(seen: Spans, G: int, q_block: int) -> jax.Array:
    B, T = seen.first.shape
    last = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    rows = [row for row in (seen.first, last, seen.context_first, seen.context_last) if row is not None]
    stacked = jnp.stack(rows, 1).reshape(B, len(rows), T // q_block, q_block).swapaxes(1, 2)
    return jnp.tile(stacked, (1, 1, 1, G)).astype(jnp.float32)  # exact below 2 ** 24 tokens, and as fast to compare


# --- kernels -------------------------------------------------------------------------------------------------------------


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """float32 product of two matrices over one dimension of each."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _stacked(ref: Any) -> jax.Array:
    """The heads of a group on top of each other: [G, q_block, H] as [G * q_block, H]."""
    block = ref[...]
    return block.reshape(-1, block.shape[-1])


def _scores(q, k, rows, k_block: jax.Array, scale: float) -> jax.Array:
    """Masked scores in base 2, [keys, stacked queries]; `rows` are the spans of the queries."""
    scores = _dot(k, q, (1, 1)) * (scale * LOG2E)
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0).astype(jnp.float32)
    rows = [row - (k_block * k.shape[0]).astype(jnp.float32) for row in rows]
    seen = (key >= rows[0]) & (key <= rows[1])
    if len(rows) == 4:
        seen |= (key >= rows[2]) & (key <= rows[3])
    return jnp.where(seen, scores, MASKED)


def _split(rows_ref: Any, first: int = 0) -> list[jax.Array]:
    return [rows_ref[i : i + 1, :] for i in range(first, rows_ref.shape[0])]


def _forward_kernel(place, step, q_ref, k_ref, v_ref, rows_ref, out_ref, norm_ref, peak, total, sums, *, scale):
    del place
    entry = step[pl.program_id(1)]

    @pl.when(entry & work.FIRST != 0)
    def _():
        peak[...] = jnp.full_like(peak, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(entry & work.SEEN != 0)
    def _():
        v = v_ref[...]
        scores = _scores(_stacked(q_ref), k_ref[...], _split(rows_ref), entry >> 8, scale)
        before = peak[...]
        now = jnp.maximum(before, scores.max(0, keepdims=True))
        weights, shrink = jnp.exp2(scores - now), jnp.exp2(before - now)
        peak[...] = now
        total[...] = shrink * total[...] + weights.sum(0, keepdims=True)
        sums[...] = sums[...] * shrink + _dot(v, weights.astype(v.dtype), (0, 0))

    @pl.when(entry & work.LAST != 0)
    def _():
        some = total[...] > 0
        whole = jnp.where(some, total[...], 1.0)
        out = (sums[...] / whole).T  # sums of queries that see nothing are 0
        out_ref[...] = out.astype(out_ref.dtype).reshape(out_ref.shape)
        norm_ref[...] = jnp.where(some, peak[...] + jnp.log2(whole), -MASKED)

    @pl.when(entry & work.BROKEN != 0)
    def _():
        out_ref[...] = jnp.full_like(out_ref, jnp.nan)


def _backward_kernel(
    place, step, q_ref, dout_ref, k_ref, v_ref, rows_ref, dk_ref, dv_ref, dq_ref, partials, dq, sums, arrived, *, plan
):
    """`rows_ref`: the norm and the delta of the tile's queries, then their spans. `sums`: dk and dv of the key block."""
    at = pl.program_id(1)
    entry, blocks = step[at], plan.sizes.blocks
    chunked = plan.sizes.chunk < plan.sizes.T

    @pl.when(entry & work.CHUNK_FIRST != 0)
    def _():
        dq[...] = jnp.zeros_like(dq)

    @pl.when(entry & (work.FIRST | (work.RESUMES if chunked else 0)) == work.FIRST)
    def _():
        sums[...] = jnp.zeros_like(sums)

    if chunked:
        begin = pl.multiple_of((entry >> 8) * blocks.k_backward, blocks.k_backward)
        left = partials.at[jax.lax.rem(pl.program_id(0), plan.partials), :, pl.ds(begin, blocks.k_backward), :]

        @pl.when(entry & (work.FIRST | work.RESUMES) == work.FIRST | work.RESUMES)
        def _():
            copy = pltpu.make_async_copy(left, sums, arrived)
            copy.start()
            copy.wait()

    @pl.when(entry & work.SEEN != 0)
    def _():
        q, dout, k = _stacked(q_ref), _stacked(dout_ref), k_ref[...]
        norm, delta, *rows = _split(rows_ref)
        weights = jnp.exp2(_scores(q, k, rows, entry >> 8, plan.scale) - norm)
        sums[1] += _dot(weights.astype(dout.dtype), dout, (1, 0))
        dscores = (weights * (_dot(v_ref[...], dout, (1, 1)) - delta)).astype(q.dtype)
        sums[0] += _dot(dscores, q, (1, 0))
        block = jax.lax.rem(place[at] & 0xFFFF, plan.sizes.chunk // blocks.q_backward)
        here = (slice(None), pl.ds(pl.multiple_of(block * blocks.q_backward, blocks.q_backward), blocks.q_backward))
        dq[here] += _dot(dscores, k, (0, 0)).reshape(dq.shape[0], blocks.q_backward, dq.shape[2])

    if chunked:

        @pl.when(entry & (work.LAST | work.PAUSES) == work.LAST | work.PAUSES)
        def _():
            copy = pltpu.make_async_copy(sums, left, arrived)
            copy.start()
            copy.wait()

    @pl.when(entry & (work.LAST | (work.PAUSES if chunked else 0)) == work.LAST)
    def _():
        dk_ref[...] = (sums[0] * plan.scale).astype(dk_ref.dtype)
        dv_ref[...] = sums[1].astype(dv_ref.dtype)

    @pl.when(entry & work.CHUNK_LAST != 0)
    def _():
        dq_ref[...] = (dq[...] * plan.scale).astype(dq_ref.dtype)


# --- calls ---------------------------------------------------------------------------------------------------------------


def _spec(shape: tuple[int | None, ...], at: Any) -> pl.BlockSpec:
    """A block chosen by `at(head, row, query block, key block)` of the list's current entry."""

    def index(head, entry, place, step):
        return at(head, place[entry] >> 16, place[entry] & 0xFFFF, step[entry] >> 8)

    return pl.BlockSpec(shape, index)


def _call(body, plan: _Plan, todo: Work, heads: int, matmuls: int, specs, outputs, scratch, arrays, name: str):
    """`specs` of inputs and of outputs. Costs are given as if every row were one document."""
    B, K, G, T, H = arrays[0].shape
    pairs = B * K * G * T * T // 2
    moved = sum(array.nbytes for array in arrays) + sum(math.prod(out.shape) * out.dtype.itemsize for out in outputs)
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(heads, todo.size), in_specs=specs[0], out_specs=specs[1], scratch_shapes=scratch
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.sizes.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=2 * matmuls * pairs * H, transcendentals=pairs, bytes_accessed=moved),
        interpret=plan.interpret,
        name=name,
    )(todo.place, todo.step, *arrays)


def _forward(plan: _Plan, q_BKGTH, k_BKTH, v_BKTH, ready: Prepared) -> tuple[jax.Array, jax.Array]:
    """Attended values and, in base 2, the log of every query's normaliser [B, K, blocks, 1, G * q_block]."""
    B, K, G, T, H = q_BKGTH.shape
    bq, bk = plan.sizes.blocks.q_forward, plan.sizes.blocks.k_forward
    kinds = ready.forward_rows.shape[2]
    queries = _spec((None, None, G, bq, H), lambda h, b, i, j: (b, h, 0, i, 0))
    keys = _spec((None, None, bk, H), lambda h, b, i, j: (b, h, j, 0))
    rows = _spec((None, None, kinds, G * bq), lambda h, b, i, j: (b, i, 0, 0))
    norms = _spec((None, None, None, 1, G * bq), lambda h, b, i, j: (b, h, i, 0, 0))
    outputs = [
        jax.ShapeDtypeStruct(q_BKGTH.shape, q_BKGTH.dtype),
        jax.ShapeDtypeStruct((B, K, T // bq, 1, G * bq), jnp.float32),
    ]
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in ((1, G * bq), (1, G * bq), (H, G * bq))]
    body = partial(_forward_kernel, scale=plan.scale)
    specs = ([queries, keys, keys, rows], [queries, norms])
    arrays = (q_BKGTH, k_BKTH, v_BKTH, ready.forward_rows)
    return _call(body, plan, ready.forward, K, 2, specs, outputs, scratch, arrays, "attention_forward")


def _backward(plan: _Plan, q_BKGTH, dout_BKGTH, k_BKTH, v_BKTH, rows, todo: Work) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v; `rows` [B, K, blocks, 4 or 6, G * q_block]."""
    B, K, G, T, H = q_BKGTH.shape
    bq, bk, chunk = plan.sizes.blocks.q_backward, plan.sizes.blocks.k_backward, plan.sizes.chunk
    queries = _spec((None, None, G, bq, H), lambda h, b, i, j: (b, h, 0, i, 0))
    keys = _spec((None, None, bk, H), lambda h, b, i, j: (b, h, j, 0))
    info = _spec((None, None, None, *rows.shape[3:]), lambda h, b, i, j: (b, h, i, 0, 0))
    held = _spec((None, None, G, chunk, H), lambda h, b, i, j: (b, h, 0, jax.lax.div(i, chunk // bq), 0))
    left = (plan.partials, 2, T, H) if chunk < T else (1, 2, 8, 128)
    outputs = [
        jax.ShapeDtypeStruct(k_BKTH.shape, k_BKTH.dtype),
        jax.ShapeDtypeStruct(v_BKTH.shape, v_BKTH.dtype),
        jax.ShapeDtypeStruct(q_BKGTH.shape, q_BKGTH.dtype),
        jax.ShapeDtypeStruct(left, jnp.float32),
    ]
    scratch = [pltpu.VMEM(shape, jnp.float32) for shape in ((G, chunk, H), (2, bk, H))]
    specs = ([queries, queries, keys, keys, info], [keys, keys, held, pl.BlockSpec(memory_space=pl.ANY)])
    arrays = (q_BKGTH, dout_BKGTH, k_BKTH, v_BKTH, rows)
    body = partial(_backward_kernel, plan=plan)
    scratch.append(pltpu.SemaphoreType.DMA(()))
    dk, dv, dq, _ = _call(body, plan, todo, K, 5, specs, outputs, scratch, arrays, "attention_backward")
    return dq, dk, dv


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q_BKGTH, k_BKTH, v_BKTH, ready: Prepared) -> jax.Array:
    return _forward(plan, q_BKGTH, k_BKTH, v_BKTH, ready)[0]


def _fwd(plan, q_BKGTH, k_BKTH, v_BKTH, ready):
    out_BKGTH, norms = _forward(plan, q_BKGTH, k_BKTH, v_BKTH, ready)
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, ready, out_BKGTH, norms)


def _bwd(plan, saved, dout_BKGTH):
    q_BKGTH, k_BKTH, v_BKTH, ready, out_BKGTH, norms = saved
    B, K, G, T, _ = q_BKGTH.shape
    bq, before = plan.sizes.blocks.q_backward, plan.sizes.blocks.q_forward
    # rowsum(dO * O) equals rowsum(P * dP), algorithm 2, line 4
    delta_BKGT = jnp.einsum("BKGTH,BKGTH->BKGT", dout_BKGTH, out_BKGTH, preferred_element_type=jnp.float32)
    norms = norms.reshape(B, K, T // before, G, before).swapaxes(2, 3).reshape(delta_BKGT.shape)
    stats = jnp.stack([norms, delta_BKGT], 2).reshape(B, K, 2, G, T // bq, bq).transpose(0, 1, 4, 2, 3, 5)
    seen = jnp.broadcast_to(ready.backward_rows[:, None], (B, K, *ready.backward_rows.shape[1:]))
    rows = jnp.concatenate([stats.reshape(B, K, T // bq, 2, G * bq), seen], 3)
    dq, dk, dv = _backward(plan, q_BKGTH, dout_BKGTH, k_BKTH, v_BKTH, rows, ready.backward)
    return dq, dk, dv, None


_attention.defvjp(_fwd, _bwd)

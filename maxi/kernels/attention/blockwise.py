"""Attention on training rows by blocks of queries, with a hand-written backward pass: the fast form for XLA on CPU.

A block of queries meets the keys from the first that any of its queries sees up to its own end, in whole blocks. How
many that are is known at run time: one of as many compiled forms is entered, so a row costs its documents and its
windows and not its length squared. The backward pass recomputes probabilities from the saved log-normaliser, as flash
attention does (Dao, arXiv:2307.08691, algorithm 2).

Scores are [keys, queries] there and [queries, keys] in the forward pass: so all dots but one have the form that XLA:CPU
is fast in (see `maxi.kernels.cpu`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxi.kernels.attention.reference import LOWEST, MASKED
from maxi.kernels.attention.spans import Spans, pad, spans
from maxi.kernels.cpu import dot, kept, restored
from maxi.kernels.platform import platform
from maxi.sharding import local, shards

MIN_BLOCK, MAX_BLOCKS = 128, 16
"""Blocks below 128 queries lose more in matmul efficiency than they skip; more than 16 only compile longer."""


def why_not(call: Any) -> str | None:
    if call.T != call.S:
        return f"it needs as many queries as keys, not {call.T} and {call.S}"
    if shards("T") > 1:
        return f"it needs whole rows, not rows split over {shards('T')} devices"
    if platform() != "cpu":
        return f"it is made for CPU, not {platform()}"
    return None


def prepare(call: Any, positions_BT: jax.Array, segments_BT: jax.Array, contexts_BT: jax.Array | None) -> Spans:
    return spans(positions_BT, segments_BT, contexts_BT, call.window)


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del k_positions, k_segments  # T == S: queries and keys are the same tokens
    seen = spans(q_positions, q_segments, q_contexts, window) if prepared is None else prepared
    places = [a for a in seen if a is not None]
    letters = ("BTNH", "BTKH", "BTKH", *("BT" for _ in places))
    return local(partial(_run, scale), letters, "BTNH")(q_BTNH, k_BSKH, v_BSKH, *places)


class _Sees(NamedTuple):
    """`Spans` of the queries of each block, the group's heads one after the other: [C, G * size], C blocks of all rows;
    and how many blocks of keys stand between the first that a block meets and its own, [C]."""

    first: jax.Array
    last: jax.Array
    context_first: jax.Array | None
    context_last: jax.Array | None
    reach: jax.Array


def _run(scale, q_BTNH, k_BTKH, v_BTKH, *places):
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    size = min(T, max(MIN_BLOCK, -(-T // MAX_BLOCKS)))
    filled = partial(_filled, -(-T // size) * size)
    sees = _sees(pad(Spans(*places), -(-T // size) * size), size, N // K)
    q_CKTH = filled(q_BTNH).reshape(B, -1, size, K, N // K, H).transpose(0, 1, 3, 4, 2, 5).reshape(len(sees.reach), K, -1, H)
    k_BKTH, v_BKTH = (filled(a).swapaxes(1, 2) for a in (k_BTKH, v_BTKH))
    out_CKTH: Any = _attention(scale, q_CKTH, k_BKTH, v_BKTH, sees)
    return out_CKTH.reshape(B, -1, K, N // K, size, H).transpose(0, 1, 4, 2, 3, 5).reshape(B, -1, N, H)[:, :T]


def _filled(T: int, a: jax.Array) -> jax.Array:
    """`a` with T tokens."""
    return a if a.shape[1] == T else jnp.pad(a, [(0, 0), (0, T - a.shape[1]), *[(0, 0)] * (a.ndim - 2)])


def _sees(seen: Spans, size: int, G: int) -> _Sees:
    B, T = seen.first.shape
    last = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    earliest = seen.first if seen.context_first is None else jnp.minimum(seen.first, seen.context_first)
    reach = jnp.arange(T // size) - earliest.reshape(B, -1, size).min(-1) // size

    def each(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else jnp.tile(a.reshape(-1, size), (1, G))

    first, last, *context = map(each, (seen.first, last, *seen[1:]))
    return _Sees(first, last, *context, reach=jnp.maximum(reach, 0).reshape(-1))  # type: ignore[arg-type]


def _scan(meet, k_BKTH, v_BKTH, sees: _Sees, carry, blocks):
    """Scans `meet(place, mask, k, v, carry, block)` over the blocks of each row, which begins with `carry`. k and v are
    the part of the row's keys and values that the block meets, [K, S, H], which begins at `place`; mask [S, G * size]
    says who sees what. Gives the carry of each row at its end, and what `meet` gave of each block."""
    B, _, T, _ = k_BKTH.shape
    C = len(sees.reach) // B

    def enter(reach, k_KTH, v_KTH, carry, i, sees, block):
        place = (0, (i - reach) * (T // C), 0)
        part = (k_KTH.shape[0], (reach + 1) * (T // C), k_KTH.shape[2])
        k, v = (jax.lax.dynamic_slice(a, place, part) for a in (k_KTH, v_KTH))
        key = place[1] + jax.lax.broadcasted_iota(jnp.int32, (part[1], 1), 0)
        mask = (key >= sees.first) & (key <= sees.last)
        if sees.context_first is not None:
            mask |= (key >= sees.context_first) & (key <= sees.context_last)
        return meet(place, mask, k, v, carry, block)

    def row(_, row):
        k_KTH, v_KTH, sees, blocks = row

        def one(carry, each):
            forms = [partial(enter, reach, k_KTH, v_KTH) for reach in range(C)]
            return jax.lax.switch(each[1].reach, forms, carry, *each)

        return None, jax.lax.scan(one, carry, (jnp.arange(C, dtype=jnp.int32), sees, blocks))

    rows = jax.tree.map(lambda a: a.reshape(B, C, *a.shape[1:]), (sees, blocks))
    _, (carry, outs) = jax.lax.scan(row, None, (k_BKTH, v_BKTH, *rows))
    return carry, jax.tree.map(lambda a: a.reshape(B * C, *a.shape[2:]), outs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale, q_CKTH, k_BKTH, v_BKTH, sees):
    return _fwd(scale, q_CKTH, k_BKTH, v_BKTH, sees)[0]


def _fwd(scale, q_CKTH, k_BKTH, v_BKTH, sees):
    def meet(_, mask, k, v, carry, q):
        scores = jnp.where(mask.T, dot("kth,ksh->kts", q, k) * scale, MASKED)
        peak = jnp.maximum(scores.max(-1, keepdims=True), LOWEST)
        weights = jnp.exp(scores - peak)
        total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        out = dot("kts,ksh->kth", weights.astype(q.dtype), v) / total
        return carry, (out.astype(q.dtype), (peak + jnp.log(total))[..., 0])

    _, (out_CKTH, norm_CKT) = _scan(meet, k_BKTH, v_BKTH, sees, (), q_CKTH)
    return out_CKTH, kept((q_CKTH, k_BKTH, v_BKTH, sees, out_CKTH, norm_CKT))


def _bwd(scale, saved, dout_CKTH):
    q_CKTH, k_BKTH, v_BKTH, sees, out_CKTH, norm_CKT = restored(saved)
    # rowsum(dO * O) equals rowsum(P * dP), algorithm 2, line 4
    delta_CKT = (dout_CKTH.astype(jnp.float32) * out_CKTH.astype(jnp.float32)).sum(-1)

    def meet(place, mask, k, v, carry, block):
        q, dout, norm, delta = block
        scores = jnp.where(mask, dot("ksh,kth->kst", k, q) * scale, MASKED)
        weights = jnp.exp(scores - norm[:, None])
        dscores = (weights * (dot("ksh,kth->kst", v, dout) - delta[:, None]) * scale).astype(q.dtype)
        dkv = dot("kst,kth->ksh", dscores, q), dot("kst,kth->ksh", weights.astype(q.dtype), dout)
        dq = dot("khs,kst->kht", k.swapaxes(1, 2), dscores)
        carry = tuple(_add(whole, part, place) for whole, part in zip(carry, dkv, strict=True))
        return carry, dq.astype(q.dtype)

    blocks = (q_CKTH, dout_CKTH, norm_CKT, delta_CKT)
    zeros = (jnp.zeros(k_BKTH.shape[1:], jnp.float32),) * 2
    (dk_BKTH, dv_BKTH), dq_CKHT = _scan(meet, k_BKTH, v_BKTH, sees, zeros, blocks)
    return dq_CKHT.swapaxes(2, 3), dk_BKTH.astype(k_BKTH.dtype), dv_BKTH.astype(v_BKTH.dtype), None


_attention.defvjp(_fwd, _bwd)


def _add(whole: jax.Array, part: jax.Array, place) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, jax.lax.dynamic_slice(whole, place, part.shape) + part, place)

"""Attention by blocks of queries, with a hand-written backward pass; the fast form for XLA on CPU.

A block of queries meets only the keys up to its end, and with a window only those from its reach on, so nearly half
of all scores (or more) is never computed. The backward pass recomputes probabilities from the saved log-normaliser,
as flash attention does (Dao, arXiv:2307.08691, algorithm 2), one block at a time.

Group and query are contracted together in the gradients of keys and values: two contracting dimensions select
XLA:CPU's fast matmul, where one runs at half to a third of the speed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxi.kernels.attention.reference import MASKED, visible

MIN_BLOCK, MAX_BLOCKS = 128, 16
"""Blocks below 128 queries lose more in matmul efficiency than they skip; more than 16 only compile longer."""

Arrays = tuple[jax.Array, ...]
Places = tuple[jax.Array, jax.Array, jax.Array | None]
"""Positions, segments and contexts, [B, T] each."""


def why_not(call: Any) -> str | None:
    if call.T != call.S:
        return f"it needs as many queries as keys, not {call.T} and {call.S}"
    if jax.default_backend() != "cpu":
        return f"it is made for CPU, not {jax.default_backend()}"
    return None


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del k_positions, k_segments, prepared  # T == S: queries and keys are the same tokens
    return _attention(window, scale, q_BTNH, k_BSKH, v_BSKH, (q_positions, q_segments, q_contexts))


def _spans(T: int, window: int | None, places: Places) -> list[tuple[int, int, int]]:
    """(first query, end of queries and keys, first key) of every block."""
    size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    # with contexts, keys within the window's positions may stand further back: another answer lies in between
    reach = T if window is None or places[2] is not None else window
    return [(start, min(start + size, T), max(0, start - reach + 1)) for start in range(0, T, size)]


def _scores(scale, window, q_BtKGH, k_BsKH, places: Places, span: tuple[int, int, int]) -> jax.Array:
    start, end, first = span
    positions, segments, contexts = places
    mask = visible(
        positions[:, start:end],
        positions[:, first:end],
        segments[:, start:end],
        segments[:, first:end],
        None if contexts is None else contexts[:, start:end],
        window,
    )[:, None, None]
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BtKGH, k_BsKH, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores * scale, MASKED)


def _grouped(q_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H)


def _forward(window, scale, q_BTNH, k_BTKH, v_BTKH, places) -> tuple[jax.Array, Arrays]:
    q_BTKGH = _grouped(q_BTNH, k_BTKH.shape[2])
    outs, norms = [], []
    for span in _spans(q_BTNH.shape[1], window, places):
        start, end, first = span
        scores = _scores(scale, window, q_BTKGH[:, start:end], k_BTKH[:, first:end], places, span)
        peak = scores.max(-1, keepdims=True)
        weights = jnp.where(scores > MASKED, jnp.exp(scores - peak), 0.0)
        total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
        norms.append(peak + jnp.log(total))
        weights = (weights / total).astype(v_BTKH.dtype)
        outs.append(jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BTKH[:, first:end], preferred_element_type=jnp.float32))
    out_BTNH = jnp.concatenate(outs, 1).reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    return out_BTNH, tuple(norms)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(window, scale, q_BTNH, k_BTKH, v_BTKH, places):
    return _forward(window, scale, q_BTNH, k_BTKH, v_BTKH, places)[0]


def _fwd(window, scale, q_BTNH, k_BTKH, v_BTKH, places):
    out_BTNH, norms = _forward(window, scale, q_BTNH, k_BTKH, v_BTKH, places)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, places, out_BTNH, norms)


def _bwd(window, scale, saved, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, places, out_BTNH, norms = saved
    K, dtype = k_BTKH.shape[2], q_BTNH.dtype
    q_BTKGH, dout_BTKGH = _grouped(q_BTNH, K), _grouped(dout_BTNH, K)
    # rowsum(dO * O) equals rowsum(P * dP), algorithm 2, line 4
    delta = jnp.einsum("BTNH,BTNH->BTN", dout_BTNH.astype(jnp.float32), out_BTNH.astype(jnp.float32))
    delta_BKGT = delta.reshape(*delta.shape[:2], K, -1).transpose(0, 2, 3, 1)
    dk_BTKH, dv_BTKH = (jnp.zeros(k_BTKH.shape, jnp.float32) for _ in range(2))
    dqs = []
    for span, norm in zip(_spans(q_BTNH.shape[1], window, places), norms, strict=True):
        start, end, first = span
        q, k, v, dout = q_BTKGH[:, start:end], k_BTKH[:, first:end], v_BTKH[:, first:end], dout_BTKGH[:, start:end]
        scores = _scores(scale, window, q, k, places, span)
        weights = jnp.where(scores > MASKED, jnp.exp(scores - norm), 0.0)
        dweights = jnp.einsum("BTKGH,BSKH->BKGTS", dout, v, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta_BKGT[..., start:end, None]) * scale).astype(dtype)
        dqs.append(jnp.einsum("BKGTS,BSKH->BTKGH", dscores, k, preferred_element_type=jnp.float32))
        dk = jnp.einsum("BKGTS,BTKGH->BSKH", dscores, q, preferred_element_type=jnp.float32)
        dv = jnp.einsum("BKGTS,BTKGH->BSKH", weights.astype(dtype), dout, preferred_element_type=jnp.float32)
        dk_BTKH, dv_BTKH = dk_BTKH.at[:, first:end].add(dk), dv_BTKH.at[:, first:end].add(dv)
    dq_BTNH = jnp.concatenate(dqs, 1).reshape(q_BTNH.shape)
    return dq_BTNH.astype(dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None


_attention.defvjp(_fwd, _bwd)

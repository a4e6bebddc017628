"""The definition of attention, in plain XLA: all T x S scores at once. Runs everywhere, differentiates by itself."""

from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Stands for minus infinity: a row with no visible key stays finite and is zeroed afterwards."""
LOWEST = -1e20
"""No score that counts is below it, and it is so far above MASKED that exp(MASKED - LOWEST) is zero."""


def why_not(call: Any) -> str | None:  # noqa: ARG001
    return None


def visible(
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    q_contexts: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Boolean [B, T, S]: which keys [B, S] a query [B, T] sees. The one definition of the mask."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    same = q_segments[:, :, None] == k_segments[:, None, :]
    if q_contexts is not None:
        same |= q_contexts[:, :, None] == k_segments[:, None, :]
    seen = same & (k_segments[:, None, :] != 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def run(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    *,
    q_contexts: jax.Array | None,
    window: int | None,
    scale: float,
    prepared: Any = None,  # noqa: ARG001
) -> jax.Array:
    """See `maxi.kernels.attention.attention`."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    mask = visible(q_positions, k_positions, q_segments, k_segments, q_contexts, window)[:, None, None]
    weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)

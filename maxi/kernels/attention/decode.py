"""Attention of new tokens over a cache, on CPU: every dot in the form that XLA:CPU is fast in (see `maxi.kernels.cpu`).

Heads come before slots here. A cache that is stored that way and handed over turned ([B, S, K, H] in name) is read as
it lies; one that is stored otherwise is copied for every token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxi.kernels import cpu
from maxi.kernels.attention.reference import MASKED, visible


def why_not(call: Any) -> str | None:
    if call.T == call.S:
        return "it is made for a cache, which has more slots than there are new tokens"
    return cpu.why_not()


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del prepared
    B, T, N, H = q_BTNH.shape
    K, dtype = k_BSKH.shape[2], q_BTNH.dtype
    q_BKTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    mask = visible(q_positions, k_positions, q_segments, k_segments, q_contexts, window)
    mask = jnp.tile(mask, (1, N // K, 1))[:, None]
    scores = jnp.where(mask, cpu.dot("BKTH,BKSH->BKTS", q_BKTH, k_BKSH) * scale, MASKED)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0).astype(dtype)
    out_BKTH = cpu.dot("BKTS,BKSH->BKTH", weights, v_BKSH).astype(dtype)
    return out_BKTH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

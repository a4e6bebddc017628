"""Attention over packed rows: softmax(scale q k^T + mask) v, with grouped key/value heads.

The mask is never an array that a caller builds. A query sees a key when both have the same segment, segment 0
(padding) sees and is seen by nothing, the key's position is not after the query's, and the two are less than `window`
positions apart. A query may have a second segment, its context, which it sees by the same rules: two answers to one
prompt share the prompt that way and do not see each other. In training rows T == S; in decoding the keys are a cache of
S slots in any order.

Contract on training rows (every backend may rely on it): a segment is contiguous, positions ascend by one within it,
and a context stands before the segments that see it, its positions before theirs.

    reference.py   the definition
    blockwise.py   XLA on CPU, skipping by document
    decode.py      XLA on CPU, new tokens over a cache
    tpu.py         Pallas on TPU, skipping by document; with work.py, its lists, and tpu_blocks.py, its sizes
    gpu.py         Pallas on GPU by way of Triton, skipping by document
    cudnn.py       cuDNN, for rows of one document, by name only
    ring.py        rows split over devices
    spans.py       the mask as two spans of keys a query, for kernels
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxi.kernels.attention import blockwise, cudnn, decode, gpu, reference, ring, tpu
from maxi.kernels.dispatch import Backend, choose


class Call(NamedTuple):
    """What a backend may decide by: sizes (N, K, H the heads of the whole model), dtype, and which masks there are."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: Any
    contexts: bool
    window: int | None


BACKENDS = (
    Backend("tpu", tpu.run, tpu.why_not, tpu.prepare),
    Backend("gpu", gpu.run, gpu.why_not, gpu.prepare),
    Backend("blockwise", blockwise.run, blockwise.why_not, blockwise.prepare),
    Backend("ring", ring.run, ring.why_not),
    Backend("decode", decode.run, decode.why_not),
    Backend("reference", reference.run, reference.why_not),
    Backend("cudnn", cudnn.run, cudnn.why_not),  # behind what runs everything: by name only
)


def prepare(
    heads: tuple[int, int, int],
    dtype: Any,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    contexts_BT: jax.Array | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Any:
    """What `attention` needs beside q, k and v on these training rows, made once for all layers: its `prepared`.

    `heads` are N, K and H. None where the chosen backend has no use for it.
    """
    B, T = segments_BT.shape
    call = Call(B, T, T, *heads, jnp.dtype(dtype), contexts_BT is not None, window)
    chosen = choose("attention", backend, BACKENDS, call)
    return chosen.prepare and chosen.prepare(call, positions_BT, segments_BT, contexts_BT)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions: jax.Array,
    k_positions: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    q_contexts: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    prepared: Any = None,
    backend: str = "auto",
) -> jax.Array:
    """Attended values [B, T, N, H] in q's dtype; rows of segment 0 are zero.

    q [B, T, N, H]; k, v [B, S, K, H] with K dividing N; positions and segments int32 [B, T] and [B, S]; contexts int32
    [B, T], 0 for none (None: nowhere one). `scale` defaults to H ** -0.5. `prepared` is what `prepare` made of the same
    rows, window and backend; without it the backend makes it itself. Softmax and accumulation are float32. Raises
    ConfigError for a named `backend` that cannot run this call. Source: Vaswani et al., arXiv:1706.03762, equation 1;
    grouped heads, arXiv:2305.13245.
    """
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    B, T, N, H = q_BTNH.shape
    scale = H**-0.5 if scale is None else scale
    call = Call(B, T, k_BSKH.shape[1], N, k_BSKH.shape[2], H, q_BTNH.dtype, q_contexts is not None, window)
    chosen = choose("attention", backend, BACKENDS, call)
    places = (q_positions, k_positions, q_segments, k_segments)
    return chosen.run(q_BTNH, k_BSKH, v_BSKH, *places, q_contexts=q_contexts, window=window, scale=scale, prepared=prepared)

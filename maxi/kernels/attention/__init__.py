"""Attention over packed rows: softmax(scale q k^T + mask) v, with grouped key/value heads.

The mask is never an array that a caller builds. A query sees a key when both have the same segment, segment 0
(padding) sees and is seen by nothing, the key's position is not after the query's, and the two are less than `window`
positions apart. A query may have a second segment, its context, which it sees by the same rules: two answers to one
prompt share the prompt that way and do not see each other. In training rows T == S; in decoding the keys are a cache of
S slots in any order.

Contract on training rows (every backend may rely on it): a segment is contiguous, positions ascend within it, and a
context stands before the segments that see it, its positions before theirs.
"""

import jax

from maxi.kernels.attention import blockwise, reference
from maxi.kernels.dispatch import Backend, choose

BACKENDS = (
    Backend("blockwise", blockwise.run, blockwise.why_not),
    Backend("reference", reference.run, reference.why_not),
)


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
    backend: str = "auto",
) -> jax.Array:
    """Attended values [B, T, N, H] in q's dtype; rows of segment 0 are zero.

    q [B, T, N, H]; k, v [B, S, K, H] with K dividing N; positions and segments int32 [B, T] and [B, S]; contexts int32
    [B, T], 0 for none (None: nowhere one). `scale` defaults to H ** -0.5. Softmax and accumulation are float32. Raises
    ConfigError for a named `backend` that cannot run this call. Source: Vaswani et al., arXiv:1706.03762, equation 1;
    grouped heads, arXiv:2305.13245.
    """
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose("attention", backend, BACKENDS, q_BTNH, k_BSKH)
    places = (q_positions, k_positions, q_segments, k_segments)
    return chosen.run(q_BTNH, k_BSKH, v_BSKH, *places, q_contexts=q_contexts, window=window, scale=scale)

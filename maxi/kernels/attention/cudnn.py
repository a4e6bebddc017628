"""Attention by cuDNN's flash attention (`jax.nn.dot_product_attention`), for rows of one document each; by name only.

cuDNN knows causal masks, windows and grouped heads, but nothing of segments. Whether rows hold several documents is in
the data and not in the call, so two things keep it from packed rows: `auto` never comes to it, because it stands behind
`reference` in the list of backends, which runs everything; and asked for by name it checks every row, and a row that
holds more than one document (or begins with padding) comes out as NaN, which the step refuses, and not as another mask.

It is for rows without neighbours: chat.pack false, or across_documents. `gpu` computes the same there and everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxi import sharding
from maxi.kernels import platform

IMPLEMENTATION = "cudnn"


def why_not(call: Any) -> str | None:
    if platform.platform() != "gpu":
        return f"it is made for GPU, not {platform.platform()}"
    if call.T != call.S:
        return f"it needs as many queries as keys, not {call.T} and {call.S}"
    if call.contexts:
        return "it knows no contexts: set chat.share_prompt to false"
    if str(call.dtype) not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not {call.dtype}"
    if call.H % 8 or call.H > 128:
        return f"it takes heads of a multiple of 8 up to 128, not {call.H}"
    if sharding.shards("T") > 1:
        return "every device needs whole rows, and the mesh splits them"
    return None


def run(q_BTNH, k_BSKH, v_BSKH, q_positions, k_positions, q_segments, k_segments, *, q_contexts, window, scale, prepared):
    """See `maxi.kernels.attention.attention`."""
    del k_positions, k_segments, q_contexts, prepared  # T == S, and no contexts

    def mine(q_BTNH, k_BSKH, v_BSKH, positions_BT, segments_BT):
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation=IMPLEMENTATION,
        )
        # where, and not a product: gradients of padding and of refused rows are then zero, whatever cuDNN wrote there
        out_BTNH = jnp.where((segments_BT != 0)[:, :, None, None], out_BTNH, 0)
        return jnp.where(_single(positions_BT, segments_BT)[:, None, None, None], out_BTNH, jnp.nan)

    inputs = ("BTNH", "BTKH", "BTKH", "BT", "BT")
    return sharding.local(mine, inputs, "BTNH")(q_BTNH, k_BSKH, v_BSKH, q_positions, q_segments)


def _single(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Boolean [B]: rows of one document, with nothing but padding behind it."""
    more = segments_BT[:, 1:] != 0
    goes_on = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (positions_BT[:, 1:] == positions_BT[:, :-1] + 1)
    return ~(more & ~goes_on).any(1)

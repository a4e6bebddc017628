"""Queries and keys made ready for attention: each head normed where the model norms them, then rotated by its position.

reference.py   the definition; XLA differentiates and fuses it
tpu.py         the rotation as a matmul, both steps at once, the backward pass written out
"""

import jax

from maxi.kernels.dispatch import Backend, choose
from maxi.kernels.rotary import reference, tpu

BACKENDS = (Backend("tpu", tpu.run, tpu.why_not), Backend("reference", reference.run, reference.why_not))


def rotary(
    x_BTNH: jax.Array,
    cos_BTH: jax.Array,
    sin_BTH: jax.Array,
    weight_H: jax.Array | None = None,
    eps: float = 0.0,
    backend: str = "auto",
) -> jax.Array:
    """Heads [B, T, N, H] with the pairs (i, i + H/2) rotated, after RMSNorm over H with this weight if there is one.

    cos and sin are float32 [B, T, H], both halves alike. Computed in float32, returned in x's dtype. Sources: Su et
    al., arXiv:2104.09864, equation 34, in Llama's order of dimensions; norm of heads, arXiv:2302.05442, section 2.1.
    """
    return choose("rotary", backend, BACKENDS, x_BTNH).run(x_BTNH, cos_BTH, sin_BTH, weight_H, eps)

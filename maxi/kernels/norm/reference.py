"""The definition of RMSNorm."""

import jax
import jax.numpy as jnp


def why_not() -> str | None:
    return None


def run(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """See `maxi.kernels.norm.rms_norm`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)

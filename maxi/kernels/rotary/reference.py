"""The definition of the rotation."""

import jax
import jax.numpy as jnp

from maxi.kernels.norm import rms_norm


def why_not(x_BTNH: jax.Array) -> str | None:  # noqa: ARG001
    return None


def run(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array, weight_H: jax.Array | None, eps: float) -> jax.Array:
    """See `maxi.kernels.rotary.rotary`."""
    if weight_H is not None:
        x_BTNH = rms_norm(x_BTNH, weight_H, eps)
    half = x_BTNH.shape[-1] // 2
    first, second = x_BTNH[..., :half].astype(jnp.float32), x_BTNH[..., half:].astype(jnp.float32)
    cos, sin = cos_BTH[:, :, None, :half], sin_BTH[:, :, None, :half]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)

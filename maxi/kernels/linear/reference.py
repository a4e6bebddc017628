"""The definition: one einsum, which the compiler splits and differentiates."""

from typing import Any

import jax

from maxi.sharding import einsum


def why_not() -> str | None:
    return None


def run(pattern: str, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """See `maxi.kernels.linear.linear`."""
    return einsum(pattern, x, w.astype(x.dtype), preferred_element_type=None if dtype == x.dtype else dtype)

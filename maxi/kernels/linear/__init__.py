"""A weight applied to activations: the matmul of every projection in a layer.

reference.py   the definition, one einsum; what accelerators run
cpu.py         XLA on CPU: matrices, float32 results, and gradients in the forms that are fast there
"""

from typing import Any

import jax
import jax.numpy as jnp

from maxi.kernels.dispatch import Backend, choose
from maxi.kernels.linear import cpu, reference

BACKENDS = (Backend("cpu", cpu.run, cpu.why_not), Backend("reference", reference.run, reference.why_not))


def linear(pattern: str, x: jax.Array, w: jax.Array, backend: str = "auto", dtype: Any = None) -> jax.Array:
    """`einsum(pattern, x, w)` in `dtype`, by default x's, sharded by the letters of its result.

    The pattern's letters: x's are those that stay and then those summed over, w's those summed over and those that are
    new in either order, the result's those that stay and those that are new ("BTNH,NHD->BTD"). w may have another dtype
    and is rounded to x's; its gradient has its own. Products accumulate in float32.
    """
    return choose("linear", backend, BACKENDS).run(pattern, x, w, x.dtype if dtype is None else jnp.dtype(dtype))

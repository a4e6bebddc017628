"""RMSNorm: x / rms(x) * weight over the last dimension (Zhang and Sennrich, arXiv:1910.07467).

reference.py   the definition; XLA differentiates and fuses it
cpu.py         XLA on CPU: the backward pass written out
"""

import jax

from maxi.kernels.dispatch import Backend, choose
from maxi.kernels.norm import cpu, reference

BACKENDS = (Backend("cpu", cpu.run, cpu.why_not), Backend("reference", reference.run, reference.why_not))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, backend: str = "auto") -> jax.Array:
    """x [..., D] over its root mean square, times weight [D]; computed in float32, returned in x's dtype."""
    return choose("norm", backend, BACKENDS).run(x, weight, eps)

"""SwiGLU: silu(gate) * up (Shazeer, arXiv:2002.05202).

reference.py   the definition; XLA differentiates and fuses it
cpu.py         XLA on CPU: the backward pass written out
"""

import jax

from maxi.kernels.dispatch import Backend, choose
from maxi.kernels.swiglu import cpu, reference

BACKENDS = (Backend("cpu", cpu.run, cpu.why_not), Backend("reference", reference.run, reference.why_not))


def swiglu(gate: jax.Array, up: jax.Array, backend: str = "auto") -> jax.Array:
    """silu(gate) * up, elementwise, in their dtype."""
    return choose("swiglu", backend, BACKENDS).run(gate, up)

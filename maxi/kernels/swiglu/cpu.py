"""SwiGLU with its backward pass written out: both gradients in one pass over gate and up, which is all it keeps."""

import jax
import jax.numpy as jnp

from maxi.kernels.cpu import kept, restored
from maxi.kernels.cpu import why_not as why_not

__all__ = ["run", "why_not"]


@jax.custom_vjp
def run(gate: jax.Array, up: jax.Array) -> jax.Array:
    """See `maxi.kernels.swiglu.swiglu`."""
    return _fwd(gate, up)[0]


def _fwd(gate, up):
    wide = gate.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(wide) * up.astype(jnp.float32)).astype(gate.dtype), kept((gate, up))


def _bwd(saved, dout):
    gate, up = restored(saved)
    wide, dout = gate.astype(jnp.float32), dout.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(wide)
    dgate = dout * up.astype(jnp.float32) * sigmoid * (1 + wide * (1 - sigmoid))
    return dgate.astype(gate.dtype), (dout * wide * sigmoid).astype(up.dtype)


run.defvjp(_fwd, _bwd)

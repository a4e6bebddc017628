"""What XLA on CPU is good at, in one place: who may use the forms made for it, and the forms of its dots.

The form of a dot decides its speed there. Fast are products of matrices and of stacks of matrices in which the shared
dimension ends the left operand (`x @ w`, `g @ w.T`), and sums over rows as `dot_of_rows` has them. Operands
stay in their own dtype and the result is float32, since a bfloat16 result costs up to half the speed.

Not every processor multiplies bfloat16 faster than float32. AMD's since Zen 4 do so twice as fast; Intel's, in vectors,
half as fast (160 GFLOP/s of float32 a core against 85), and only in tiles (AMX) faster. Where it is slow, operands are
widened first: the products are the same, and so is their accumulation.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxi.kernels.platform import platform
from maxi.sharding import ACTIVATIONS, einsum, shards


def why_not() -> str | None:
    """Why the forms for CPU cannot be used in what is being traced."""
    if platform() != "cpu":
        return f"it is made for CPU, not {platform()}"
    if any(shards(letter) > 1 for letter in ACTIVATIONS):
        return "it is made for one device, and the mesh splits arrays"
    return None


def dot(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with a float32 result, operands in the dtype that this processor is fast in."""
    if jnp.bfloat16 in (a.dtype, b.dtype) and not multiplies_bfloat16(_cpu_info()):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)


def dot_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b, float32, of matrices with as many rows: the gradient of a weight.

    In bfloat16 the rows are summed over in two dimensions, which doubles the speed there; in float32 that would cost some.
    """
    if a.dtype == jnp.bfloat16 and multiplies_bfloat16(_cpu_info()) and a.shape[0] % 2 == 0:
        return dot("cnk,cnm->km", *(x.reshape(2, -1, x.shape[1]) for x in (a, b)))
    return dot("nk,nm->km", a, b)


def product(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`sharding.einsum` with a float32 result, by `dot` where that is allowed."""
    return dot(pattern, a, b) if why_not() is None else einsum(pattern, a, b, preferred_element_type=jnp.float32)


def product_of_rows(a_BTV: jax.Array, b_BTD: jax.Array) -> jax.Array:
    """The float32 sum over B and T, [V, D], by `dot_of_rows` where that is allowed."""
    if why_not() is None:
        return dot_of_rows(*(x.reshape(-1, x.shape[-1]) for x in (a_BTV, b_BTD)))
    return jnp.einsum("BTV,BTD->VD", a_BTV, b_BTD, preferred_element_type=jnp.float32)


def computed_once(x: jax.Array) -> jax.Array:
    """x itself, behind a barrier, or a compiler would compute it anew wherever it is used, in every layer and for every
    head. XLA:CPU drops barriers before it fuses: there it goes through a dot with ones on the diagonal."""
    if why_not():
        return jax.lax.optimization_barrier(x)
    return dot("...d,dk->...k", x, jnp.eye(x.shape[-1], dtype=x.dtype)).astype(x.dtype)


def kept(arrays: Any) -> Any:
    """What a backward pass needs again (a tree), as it should be kept: bfloat16 as the integers it is stored as. In a scan
    over layers XLA:CPU turns all that is kept so far into float32 and back for every layer otherwise."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.bfloat16 else a, arrays)


def restored(arrays: Any) -> Any:
    """The inverse of `kept`; nobody keeps integers of 16 bits themselves."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, arrays)


def multiplies_bfloat16(info: str) -> bool:
    """Whether a processor (the text of /proc/cpuinfo) multiplies bfloat16 faster than float32."""
    words = set(info.split())
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


@functools.cache
def _cpu_info() -> str:
    """The first processor's part of /proc/cpuinfo; empty where there is none."""
    file = Path("/proc/cpuinfo")
    return file.read_text("utf-8").partition("\n\n")[0] if file.is_file() else ""

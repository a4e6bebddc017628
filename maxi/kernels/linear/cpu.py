"""Matmuls for XLA on CPU: operands as matrices, float32 results, the backward pass written out (see `maxi.kernels.cpu`).

Differentiating a dot with a float32 result gives dots of a bfloat16 and a float32 operand, which run at half the speed;
here both operands of a gradient have the activations' dtype. The gradient of a weight is float32 when the weight is,
and was never rounded in between.
"""

from functools import partial
from typing import Any

import jax

from maxi.kernels.cpu import dot, dot_of_rows, kept, restored
from maxi.kernels.cpu import why_not as why_not

__all__ = ["run", "why_not"]


FEW_ROWS = 16
"""Up to as many, as in decoding, a product costs reading the weight. XLA:CPU copies the right operand of a dot, so the weight
stands on the left then."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def run(pattern: str, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """See `maxi.kernels.linear.linear`."""
    return _fwd(pattern, x, w, dtype)[0]


def _fwd(pattern, x, w, dtype):
    shared, is_turned = _form(pattern)
    rows, columns = x.shape[: x.ndim - shared], w.shape[: w.ndim - shared] if is_turned else w.shape[shared:]
    matrix = _matrix(w, shared, is_turned).astype(x.dtype)
    out = _applied(_rows(x, shared), matrix, is_turned)
    return out.astype(dtype).reshape(*rows, *columns), kept((x, w))


def _bwd(pattern, dtype, saved, dout):
    del dtype
    x, w = restored(saved)
    shared, is_turned = _form(pattern)
    matrix = _matrix(w, shared, is_turned).astype(x.dtype)
    x_rows, dout_rows = _rows(x, shared), _rows(dout.astype(x.dtype), w.ndim - shared)
    dx = dot("nm,mk->nk" if is_turned else "nm,km->nk", dout_rows, matrix)
    dw = dot_of_rows(dout_rows, x_rows) if is_turned else dot_of_rows(x_rows, dout_rows)
    return dx.astype(x.dtype).reshape(x.shape), dw.astype(w.dtype).reshape(w.shape)


run.defvjp(_fwd, _bwd)


def _applied(x_rows: jax.Array, matrix: jax.Array, is_turned: bool) -> jax.Array:
    """x @ w, or of a turned weight x @ w^T."""
    if len(x_rows) > FEW_ROWS:
        return dot("nk,mk->nm" if is_turned else "nk,km->nm", x_rows, matrix)
    return dot("mk,nk->mn" if is_turned else "km,nk->mn", matrix, x_rows).T


def _form(pattern: str) -> tuple[int, bool]:
    """How many dimensions are summed over, and whether they stand last in the weight."""
    x, w, out = pattern.replace("->", ",").split(",")
    shared = "".join(letter for letter in x if letter in w)
    new = "".join(letter for letter in w if letter not in x)
    assert x.endswith(shared) and w in (shared + new, new + shared) and out == x.removesuffix(shared) + new, pattern
    return len(shared), w == new + shared


def _rows(x: jax.Array, columns: int) -> jax.Array:
    """A matrix whose rows have x's last dimensions, `columns` of them."""
    width = 1
    for size in x.shape[x.ndim - columns :]:
        width *= size
    return x.reshape(-1, width)


def _matrix(w: jax.Array, shared: int, is_turned: bool) -> jax.Array:
    return _rows(w, shared if is_turned else w.ndim - shared)

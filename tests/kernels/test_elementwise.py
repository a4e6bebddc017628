"""RMSNorm and SwiGLU: the forms for CPU against the definitions, and those against float64 numpy."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxi.kernels import norm, swiglu

rng = np.random.default_rng(0)
X, Y, WEIGHT = rng.normal(size=(3, 5, 24)), rng.normal(size=(3, 5, 24)), 1 + 0.3 * rng.normal(size=24)
OPERATIONS: dict[str, Any] = {
    "norm": (
        lambda backend, x, w: norm.rms_norm(x, w, 1e-5, backend),
        (X, WEIGHT),
        lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w,
    ),
    "swiglu": (lambda backend, g, u: swiglu.swiglu(g, u, backend), (X, Y), lambda g, u: g / (1 + np.exp(-g)) * u),
}


def _all(name: str, backend: str, dtype: str, inputs: str | None = None) -> tuple[jax.Array, ...]:
    """The result and both gradients, of inputs that were rounded to `inputs` first."""
    function, arrays, _ = OPERATIONS[name]
    *arrays, dout = (jnp.asarray(jnp.asarray(a, inputs or dtype), dtype) for a in (*arrays, Y))
    out, pull = jax.vjp(partial(function, backend), *arrays)
    return out, *pull(dout)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_the_definitions(name: str, backend: str) -> None:
    _, arrays, exact = OPERATIONS[name]
    np.testing.assert_allclose(_all(name, backend, "float32")[0], exact(*arrays), atol=2e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_autodiff(name: str) -> None:
    for a, b in zip(_all(name, "cpu", "float32"), _all(name, "reference", "float32"), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_errs_at_most_twice_the_definition(name: str) -> None:
    exact = _all(name, "reference", "float32", "bfloat16")
    for a, b, c in zip(_all(name, "cpu", "bfloat16"), _all(name, "reference", "bfloat16"), exact, strict=True):
        error, allowed = (float(jnp.abs(each.astype(jnp.float32) - c).max()) for each in (a, b))
        assert a.dtype == jnp.bfloat16 and error <= 2 * allowed
